// Chats as files: Markdown for people; JSON that can be read again, also by the terminal's /load.

function download(title, extension, content, type) {
    const link = document.createElement("a")
    link.href = URL.createObjectURL(new Blob([content], {type}))
    link.download = title.replace(/[\\/:*?"<>|\u0000-\u001f]+/g, " ").trim() + extension
    link.click()
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000)
}

// The system message of the chat, as a list.
function systemOf(chat) {
    const prompt = String(chat.settings?.system ?? "").trim()
    let tools = null
    if (modeOf(chat) === "tools")
        try { tools = JSON.parse(chat.settings?.tools) } catch { /* there are none */ }
    if (!hasRoles || (!prompt && !tools?.length)) return []
    return [{role: "system", content: prompt || toolsPrompt, ...(tools?.length ? {tools} : {})}]
}

function fileOf(chat) {
    const {history, notes, pictures} = whole(chat)
    const content = [...systemOf(chat), ...history]
    return {chatglm_version: generation, title: title(chat), history: content, notes, pictures, settings: chat.settings}
}

function exportMarkdown() {
    const chat = load(tab.id)
    if (!chat) return
    const speakers = {system: text.system, user: text.user, observation: text.observation, assistant: text.assistant}
    const said = messages(whole(chat).history).flatMap(message => {
        const tool = (message.metadata ?? "").trim()
        return [`**${speakers[message.role]}${tool && ` ⚙ ${tool}`}**`, message.content]
    })
    const system = systemOf(chat).flatMap(message => [`**${speakers.system}**`, message.content])
    download(title(chat), ".md", [`# ${title(chat)}`, ...system, ...said].join("\n\n") + "\n", "text/markdown")
}

function exportJson() {
    const chat = load(tab.id)
    if (chat) download(title(chat), ".json", JSON.stringify(fileOf(chat), null, 1) + "\n", "application/json")
}

function exportAll() {
    const content = {chatglm_version: generation, chats: all().map(fileOf)}
    download(`chatglm-${generation}`, ".json", JSON.stringify(content, null, 1) + "\n", "application/json")
}

// Returns the chats in a file that was exported here or saved by the terminal. Throws if there are none.
function chatsIn(content) {
    const read = JSON.parse(content)
    return (Array.isArray(read?.chats) ? read.chats : [read]).map(({history, notes, pictures, settings, title}) => {
        const [first, ...rest] = history
        const system = hasRoles && first?.role === "system" ? first : null
        const about = {notes: notes ?? {}, pictures: pictures ?? {}, attempt: 0}
        const chat = {id: random(), revision: random(), history: system ? rest : history, ...about}
        const known = message => ["user", "assistant", "observation"].includes(message.role)
        if (!isChat(chat) || !chat.history.length || !messages(chat.history).every(known)) throw new TypeError()
        const said = system && {system: system.content, tools: system.tools ? JSON.stringify(system.tools, null, 1) : ""}
        return {...chat, title, settings: settings || said ? {...tab.settings, ...said, ...settings} : undefined}
    })
}

function chosenFiles(accept) {
    const input = document.createElement("input")
    Object.assign(input, {type: "file", accept, multiple: true})
    return new Promise(resolve => {
        input.onchange = () => resolve([...input.files])
        input.oncancel = () => resolve([])
        input.click()
    })
}

// Files for the code of this chat, as the server takes them: [{name, data}], the data in Base64.
async function pickFiles() {
    const read = file => new Promise((resolve, reject) => {
        const reader = new FileReader()
        reader.onload = () => resolve({name: file.name, data: reader.result.replace(/^[^,]*,?/, "")})
        reader.onerror = () => reject(reader.error)
        reader.readAsDataURL(file)
    })
    const files = await chosenFiles("")
    const size = files.reduce((sum, file) => sum + file.size, 0)
    if (size > 2_500_000) return {tooLarge: size, time: Date.now()}
    return {files: await Promise.all(files.map(read)), time: Date.now()}
}

// A file that the code has made: {name, data}.
function keepFile(file) {
    if (!file?.name) return
    const bytes = Uint8Array.from(atob(file.data), letter => letter.charCodeAt(0))
    download(file.name, "", bytes, "application/octet-stream")
}

async function importFiles() {
    const files = await chosenFiles(".json,application/json")
    const contents = chat => JSON.stringify([chat.history, chat.title ?? title(chat)])
    let count = 0
    said = ""
    for (const file of files) {
        try {
            const known = new Set(all().map(contents))  // reading a file twice changes nothing
            const added = chatsIn(await file.text()).filter(chat => !known.has(contents(chat)))
            added.forEach((chat, index) => write({...chat, time: Date.now() - index}))
            count += added.length
        } catch { said += text.not_a_chat.replace("{file}", file.name) + " " }
    }
    if (files.length) said += text.imported.replace("{count}", count)
    return shown()
}

Object.assign(window.chats, {exportMarkdown, exportJson, exportAll, importFiles, pickFiles, keepFile})
