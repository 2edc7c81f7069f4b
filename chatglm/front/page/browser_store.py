"""The visitor's chats in the local store of his browser: scripts of the page. The server keeps none of them.

Every script reads the store when it runs and writes at once what it changes, so that several tabs do not undo each
other's changes. `STORE` stands for the key, `MOST` for how many chats are kept.
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
#: The same, after the chat went to the front of the store, or out of it if it is empty.
KEEP = f"""(kept, id) => {{ {_READ} {_WRITE}
    const others = read().filter(chat => chat?.id !== kept.id)
    return [write(kept.history.length ? [kept, ...others] : others), id]
}}"""
#: The same, after the open chat was taken out of the store.
FORGET = f"""(kept, id) => {{ {_READ} {_WRITE} return [write(read().filter(chat => chat?.id !== id)), id] }}"""
#: (index, listed chats) -> [index, the listed chat at the index as it is in the store now]
ONE = f"""(index, listed) => {{ {_READ}
    const chosen = listed[index]
    return [index, [read().find(chat => chat?.id === chosen.id) ?? chosen]]
}}"""
