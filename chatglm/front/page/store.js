// The visitor's chats in this browser's localStorage. They are the truth, from which the server answers; it keeps none.
//
// Each chat is an entry of its own: {id, revision, time, history, notes, pictures, attempt, turn, settings, title}. `history` has
// the model's form, without the system message. `notes` maps the index of a message to what is said under it; "" means
// that the answer was interrupted. `turn` is a question whose answer is still coming: {id, question, role, kept,
// answer}, where `kept` counts the messages before it. Entries belong to the user who is signed in.
//
// Whenever a chat is opened or asked, the server gets it with the name of a new visit, and gives that name back with
// all that follows. A visit replaces only the revision that it has seen last. If another tab has changed the chat since,
// what this visit has becomes a second chat; what comes late from a visit that was left still goes to the chat it
// belongs to. Nothing is ever removed to make room.
//
// This file and files.js are the body of one function, in which CONFIG holds what depends on the model.

const {generation, hasRoles, toolsPrompt, knobs, texts, capacity} = CONFIG
const user = window.gradio_config?.username
const name = `chatglm-${generation}` + (user ? `@${encodeURIComponent(user)}` : "")
const prefix = name + "/"
const text = texts[navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en"]

const tab = {id: "", draft: "", settings: null}  // survives a reload; `id` is the open chat's
const visits = new Map()  // name -> {id, seen, isLeft}: the chat that this visit goes on with, the revision it saw last
const unsaved = new Map()  // id -> {chat, visit}: a chat that the store did not take
const forgotten = new Set()  // ids of chats that were deleted here
let ready = false  // whether the state before a reload is restored
let growing = null  // {chat, visit}: the chat whose answer is coming here
let timer = 0
let found = ""  // what the list is searched for
let listed = []
let refused = ""  // why the store took nothing
let said = ""  // what has just happened, if the visitor should know

const random = () =>
    Array.from(crypto.getRandomValues(new Uint8Array(16)), byte => byte.toString(16).padStart(2, "0")).join("")
const isItem = item => hasRoles ? typeof item?.role === "string" && typeof item.content === "string"
    : Array.isArray(item) && item.length === 2 && item.every(part => typeof part === "string")
const isChat = chat => typeof chat?.id === "string" && Array.isArray(chat.history) && chat.history.every(isItem)

// ---------------------------------------------------------------------------------------------------- the store

function read(id) {
    try {
        const chat = JSON.parse(localStorage.getItem(prefix + id))
        return isChat(chat) && chat.id === id ? chat : null
    } catch { return null }
}

const load = id => id ? unsaved.get(id)?.chat ?? read(id) : null

function write(chat, visit = {id: chat.id, seen: chat.revision}) {
    try {
        localStorage.setItem(prefix + chat.id, JSON.stringify(chat))
        visit.seen = chat.revision
        unsaved.delete(chat.id)
    } catch (error) {  // what was stored before is still there
        unsaved.set(chat.id, {chat, visit})
        refused = error.name === "QuotaExceededError" ? text.store_full : text.store_blocked
    }
    return !unsaved.has(chat.id)
}

function remove(id) {
    try { localStorage.removeItem(prefix + id) } catch { /* it holds nothing */ }
    unsaved.delete(id)
}

// There may be room again.
function writeUnsaved() {
    for (const {chat, visit} of unsaved.values())
        if (!read(chat.id) || read(chat.id).revision === visit.seen) write(chat, visit)
}

// Changes the title or the settings. The revision stays: what other tabs have said in the chat was not seen by this.
function change(chat, changes) {
    const waiting = unsaved.get(chat.id)
    if (waiting) Object.assign(waiting.chat, changes)
    else write({...chat, ...changes})
    writeUnsaved()
}

const keys = () => { try { return Object.keys(localStorage) } catch { return [] } }

function all() {
    const stored = keys().filter(key => key.startsWith(prefix)).map(key => read(key.slice(prefix.length)))
    const chats = [...Array.from(unsaved.values(), ({chat}) => chat), ...stored.filter(chat => chat && !unsaved.has(chat.id))]
    return chats.sort((one, two) => (two.time || 0) - (one.time || 0))
}

const used = () => keys().reduce((sum, key) => sum + key.length + localStorage.getItem(key).length, 0) / capacity

function remember() {
    if (!ready) return
    try { sessionStorage.setItem(name, JSON.stringify(tab)) } catch { /* a reload will open an empty chat */ }
}

// Earlier versions kept all chats in one list.
function adoptOldList() {
    if (user) return
    try {
        const chats = JSON.parse(localStorage.getItem(name))
        const good = (Array.isArray(chats) ? chats : []).filter(chat => isChat(chat) && chat.history.length)
        if (good.map((chat, index) => write({...chat, revision: random(), time: -index})).every(Boolean))
            localStorage.removeItem(name)
    } catch { /* it is no list, or there is no store */ }
}

// ---------------------------------------------------------------------------------------------- what is in a chat

const size = history => history.length * (hasRoles ? 1 : 2)  // in messages
const messages = history => history.flatMap(item => hasRoles
    ? [item] : [{role: "user", content: item[0]}, {role: "assistant", content: item[1]}])

// The chat without `turn`: what was said so far is a turn like the others, or `unsent` without a word of an answer.
function whole(chat) {
    const {turn, ...rest} = chat
    if (!turn) return rest
    if (!turn.answer?.trim()) return {...rest, unsent: turn.question}
    const before = chat.history.slice(0, hasRoles ? turn.kept : turn.kept / 2)
    const notes = Object.fromEntries(Object.entries(chat.notes ?? {}).filter(([index]) => index < turn.kept))
    const history = hasRoles
        ? [...before, {role: turn.role, content: turn.question}, {role: "assistant", metadata: "", content: turn.answer}]
        : [...before, [turn.question, turn.answer]]
    return {...rest, history, notes: {...notes, [size(history) - 1]: ""}}
}

// What the server gets of it, for a new visit.
function place(chat) {
    const visit = random()
    const known = unsaved.get(chat.id)?.visit ?? {id: chat.id, seen: chat.revision}
    visits.set(visit, Object.assign(known, {isLeft: false}))
    const {id, history, notes, pictures, attempt} = whole(chat)
    return {id, visit, history, notes: notes ?? {}, pictures: pictures ?? {}, attempt: attempt ?? 0, opened: true}
}

// The visit to which something from the server belongs; a chat that has begun there has none yet.
function visitOf({id, visit}) {
    if (!visits.has(visit)) visits.set(visit, {id})
    return visits.get(visit)
}

function title(chat) {
    if (chat.title) return String(chat.title)
    const first = (messages(chat.history)[0]?.content ?? String(chat.turn?.question ?? "")).replace(/\s+/g, " ").trim()
    return first.length <= 40 ? first : first.slice(0, 39) + "…"
}

function begins(history, other) {
    return history.length >= other.length
        && other.every((item, index) => JSON.stringify(item) === JSON.stringify(history[index]))
}

function secondOf(chat, visit) {
    const id = random()
    Object.assign(visit, {id, seen: undefined})
    if (!visit.isLeft && tab.id === chat.id) tab.id = id
    said = text.two_chats
    return {...chat, id, title: chat.title && `${chat.title} (2)`}
}

// ------------------------------------------------------------------------------------------------ what the page shows

const displayed = {}  // what `shown` has returned last

function ifNew(name, update) {
    const written = JSON.stringify(update)
    if (displayed[name] === written) return undefined
    displayed[name] = written
    return update
}

// Values for the list, the title, the notice and the box, to which a question may return; it is put before a draft.
// What is undefined stays as it is.
function shown(unsent = "") {
    writeUnsaved()
    const wanted = found.trim().toLowerCase()
    const texts = chat => [title(chat), ...messages(whole(chat).history).map(message => message.content)]
    listed = all().filter(chat => !wanted || texts(chat).some(text => text.toLowerCase().includes(wanted)))
    const share = used()
    const room = unsaved.size ? refused
        : share > 0.8 ? text.store_almost_full.replace("{percent}", Math.round(share * 100)) : ""
    const notice = [said, room].filter(Boolean).join("\n\n")
    const open = load(tab.id)
    return [
        ifNew("list", {__type__: "update", samples: listed.map(chat => [title(chat)])}),
        document.activeElement?.closest("#rename") ? undefined : open ? title(open) : "",
        ifNew("notice", {__type__: "update", value: notice, visible: Boolean(notice)}),
        unsent && !tab.draft.includes(unsent) ? [unsent, tab.draft].filter(Boolean).join("\n") : undefined,
    ]
}

// ------------------------------------------------------------------------------------- what happens to the open chat

// The server has changed the conversation of this tab.
function save(given) {
    if (!isChat(given)) return shown()
    const {opened, unsent, visit: name, ...content} = given
    const visit = given.id ? visitOf(given) : {id: ""}
    if (forgotten.has(visit.id)) return shown(unsent)
    if (!visit.isLeft) tab.id = visit.id
    if (opened) return shown(visit.isLeft ? "" : whole(load(visit.id) ?? given).unsent)
    if (visit.id) {
        const settings = visit.isLeft ? load(visit.id)?.settings : tab.settings
        store({...content, id: visit.id, time: Date.now(), settings}, visit)
    }
    remember()
    return shown(unsent)
}

function store(chat, visit) {
    if (chat.turn) said = ""
    const old = read(chat.id)
    chat.title = load(chat.id)?.title
    if (old && old.revision !== visit.seen) {
        const theirs = whole(old).history
        if (!chat.turn && begins(theirs, chat.history)) return  // the other tab has all of it
        if (old.turn || !begins(chat.history, theirs)) chat = secondOf(chat, visit)
    }
    chat.revision = random()
    if (!visit.isLeft) growing = chat.turn ? {chat, visit} : null
    if (chat.history.length || chat.turn) write(chat, visit)
    else remove(chat.id)
}

// The answer has grown.
function grow(given) {
    if (!growing || given?.turn !== growing.chat.turn.id) return
    growing.chat.turn.answer = given.answer
    timer ||= setTimeout(flush, 250)
}

function flush() {
    clearTimeout(timer)
    timer = 0
    if (!growing || forgotten.has(growing.chat.id)) return
    const {chat, visit} = growing
    const old = read(chat.id)
    if (old && old.revision !== chat.revision && !unsaved.has(chat.id))
        growing.chat = {...secondOf(chat, visit), revision: random()}
    write({...growing.chat, title: load(growing.chat.id)?.title ?? growing.chat.title}, visit)
    remember()
}

// The conversation to which a question is added, with what other tabs have added to it. It is what the visitor has
// chosen last, even if the server has not shown it yet.
function latest(given) {
    const chat = load(tab.id)
    if (growing || (tab.id && !chat)) return here(given)
    return chat && place(chat)
}

// The conversation as this tab shows it, to be changed at a place that the visitor sees.
const here = given => given?.id ? {...given, id: visitOf(given).id} : given

function draft(written) {
    tab.draft = written ?? ""
    remember()
}

function settings(...values) {
    if (!ready) return
    tab.settings = Object.fromEntries(knobs.map((knob, index) => [knob, values[index]]))
    remember()
    if (growing) growing.chat.settings = tab.settings
    const chat = load(tab.id)
    const wanted = chat && {...tab.settings, mode: modeOf(chat)}  // a chat stays what it is
    if (chat && JSON.stringify(chat.settings) !== JSON.stringify(wanted)) change(chat, {settings: wanted})
}

// Chats from before there were modes have tools or none.
const modeOf = chat => chat.settings?.mode ?? (chat.settings?.tools ? "tools" : "chat")

// ------------------------------------------------------------------------------------------- from one chat to another

// Returns what the server shows: {place, settings}.
function visit(chat) {
    leave()
    if (chat) {
        tab.id = chat.id
        tab.settings = chat.settings ?? tab.settings
        forgotten.delete(chat.id)
    }
    remember()
    const settings = chat?.settings ? {...chat.settings, mode: modeOf(chat)} : null
    return {place: chat && place(chat), settings, time: Date.now()}
}

// The visitor has chosen another mode: its last chat opens, or an empty one.
function mode(chosen) {
    const last = all().find(chat => modeOf(chat) === chosen)
    if (last) return visit({...last, settings: {...last.settings, mode: chosen}})
    leave()
    tab.settings = {...tab.settings, mode: chosen}
    remember()
    const empty = {id: "", history: [], notes: {}, attempt: 0}
    return {place: empty, settings: {mode: chosen}, time: Date.now()}  // the rest may be being typed
}

const choose = index => visit(listed[index] ? load(listed[index].id) ?? listed[index] : null)

// The page has been loaded: what this tab had open, if anything, then the values of `shown`.
function restore(typed, ...values) {
    adoptOldList()
    let before = null
    try { before = JSON.parse(sessionStorage.getItem(name)) } catch { /* there is no store */ }
    ready = true
    tab.draft = typed || String(before?.draft ?? "")
    tab.settings = before?.settings ?? null
    const chat = load(before?.id)
    const open = chat ? visit(chat) : tab.settings ? {place: null, settings: tab.settings} : undefined
    if (!tab.settings) settings(...values)
    remember()
    const [list, title, notice] = shown()
    return [open && {...open, restored: true}, list, title, notice, typed ? undefined : tab.draft || undefined]  // who types is faster
}

function leave() {
    flush()
    growing = null
    for (const visit of visits.values()) visit.isLeft = true
    tab.id = ""
    said = ""
    remember()
}

function forget() {
    const id = tab.id
    if (id) {
        forgotten.add(id)
        remove(id)
    }
    leave()
    return shown()
}

function rename(written) {
    const chat = load(tab.id)
    if (chat && written.trim() !== title(chat)) change(chat, {title: written.trim() || undefined})
    return shown()
}

function search(written) {
    found = written ?? ""
    return shown()
}

function logout() {
    flush()
    location.assign(`${window.gradio_config.root}/logout?all_session=false`)
}

addEventListener("pagehide", flush)
addEventListener("visibilitychange", () => { if (document.visibilityState === "hidden") flush() })
addEventListener("beforeunload", event => { if (unsaved.size) event.preventDefault() })
window.chats = {save, grow, latest, here, draft, settings, mode, choose, leave, forget, rename, search, shown, logout}
