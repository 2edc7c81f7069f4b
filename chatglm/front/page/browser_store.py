"""Scripts of the page that keep a visitor's chats in the browser's localStorage. The server keeps none of them.

Every script reads the store when it runs and writes its changes at once, so that several tabs do not undo each other's
changes. `STORE` stands for the key, `MOST` for how many chats are kept.
"""

_READ = """
    const read = () => {
        try { const chats = JSON.parse(localStorage.getItem("STORE")); return Array.isArray(chats) ? chats : [] }
        catch { return [] }
    }
"""
_WRITE = """
    const write = chats => {
        chats = chats.slice(0, MOST)
        for (;;) {
            try { localStorage.setItem("STORE", JSON.stringify(chats)); return chats }
            catch (error) { if (!chats.length) return chats; chats = chats.slice(0, -1) }  // full: the oldest goes
        }
    }
"""

#: (chat, id of the open chat) -> [all chats, id]
READ = f"(kept, id) => {{ {_READ} return [read(), id] }}"
#: The same, after moving the chat to the front of the store, or removing it if it is empty.
KEEP = f"""(kept, id) => {{ {_READ} {_WRITE}
    const others = read().filter(chat => chat?.id !== kept.id)
    return [write(kept.history.length ? [kept, ...others] : others), id]
}}"""
#: The same, after removing the open chat from the store.
FORGET = f"""(kept, id) => {{ {_READ} {_WRITE} return [write(read().filter(chat => chat?.id !== id)), id] }}"""
#: (index, listed chats) -> [index, [the listed chat at that index, as the store has it now]]
ONE = f"""(index, listed) => {{ {_READ}
    const chosen = listed[index]
    return [index, [read().find(chat => chat?.id === chosen.id) ?? chosen]]
}}"""
