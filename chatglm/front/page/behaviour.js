// What the page adds to gradio's components in the browser: text as it was written, names in the visitor's language,
// who speaks, and everything by keyboard. `texts` has the texts by language, `model` is the model's name.
(texts, model) => {
    const language = document.documentElement.lang.startsWith("zh") ? "zh" : "en"  // as the server chose
    const say = texts[language]

    const one = selector => document.querySelector(selector)
    const within = (root, selector) => [
        ...(root.matches?.(selector) ? [root] : []),
        ...(root.querySelectorAll?.(selector) ?? []),
    ]
    const set = (element, name, value) => {
        if (element && element.getAttribute(name) !== value) element.setAttribute(name, value)
    }
    const stopButton = () => one("#box .stop-button")  // it is there while an answer comes

    // ------------------------------------------------------------------------- text of messages, as it was written

    // The server puts marks into markup, so that it is text. They must not be selected, copied or part of a link.
    const MARK = /\u2060/g
    const cleanText = text => { if (text.data.includes("\u2060")) text.data = text.data.replace(MARK, "") }
    const cleanLink = link => {
        if (link.title) set(link, "title", link.title.replace(MARK, ""))
        const address = link.getAttribute("href").replace(/%E2%81%A0/g, "")
        if (/^(https?|mailto):$/.test(new URL(address, location.href).protocol)) set(link, "href", address)
        else link.removeAttribute("href")
    }
    const tidy = root => {
        if (root.nodeType === Node.TEXT_NODE) return cleanText(root)
        const texts = document.createTreeWalker(root, NodeFilter.SHOW_TEXT)
        while (texts.nextNode()) cleanText(texts.currentNode)
        within(root, "a[href*='%E2%81%A0']").forEach(cleanLink)
        within(root, ".mermaid:not([data-source], :has(svg))").forEach(diagram => {
            diagram.dataset.source = diagram.textContent
        })
        within(root, "li > input[type=checkbox], li > p > input[type=checkbox]").forEach(box => {
            set(box, "aria-label", box.checked ? say.done : say.to_do)
            box.closest("li").classList.add("task")
        })
        within(root, ".copy_code_button").forEach(button => set(button, "aria-label", say.copy_code))
        within(root, "pre").forEach(code => set(code, "tabindex", "0"))  // it may scroll
        within(root, "textarea.edit-textarea").forEach(area => {
            set(area, "aria-label", say.edit)
            if (!area.value.includes("\u2060")) return
            area.value = area.value.replace(MARK, "")
            area.dispatchEvent(new Event("input", { bubbles: true }))
        })
    }
    // What mermaid cannot draw, it replaces by a bomb.
    const showSource = picture => {
        const diagram = picture.closest(".mermaid[data-source]")
        if (!diagram || picture.getAttribute("aria-roledescription") !== "error") return
        const code = document.createElement("pre")
        code.textContent = diagram.dataset.source
        diagram.replaceChildren(say.diagram, code)
    }

    // Whoever copies a formula wants its source, not the letters of its drawing, twice.
    document.addEventListener("copy", event => {
        const selection = getSelection()
        const chat = one("#chat")
        if (!event.clipboardData || selection.isCollapsed || !chat?.contains(selection.anchorNode)) return
        const range = selection.getRangeAt(0).cloneRange()
        const formula = node => (node.nodeType === Node.ELEMENT_NODE ? node : node.parentElement)?.closest(".katex")
        if (formula(range.startContainer)) range.setStartBefore(formula(range.startContainer))
        if (formula(range.endContainer)) range.setEndAfter(formula(range.endContainer))
        const copied = document.createElement("div")
        copied.append(range.cloneContents())
        const formulas = copied.querySelectorAll(".katex")
        if (!formulas.length) return
        for (const drawn of formulas) {
            const source = drawn.querySelector("annotation").textContent.trim()
            const block = drawn.closest(".katex-display")
            if (block) block.replaceWith(`$$${source}$$`)
            else drawn.replaceWith(`$${source}$`)
        }
        copied.style.cssText = "position: fixed; left: -9999px; white-space: pre-wrap"
        document.body.append(copied)  // only what is on the page has line breaks between its paragraphs
        event.clipboardData.setData("text/plain", copied.innerText)
        event.clipboardData.setData("text/html", copied.innerHTML)
        copied.remove()
        event.preventDefault()
    })

    // ---------------------------------------------------------------------------------------- names, and who speaks

    const translate = (element, name) => {
        const text = element.getAttribute(name)
        if (Object.hasOwn(say.gradio, text)) set(element, name, say.gradio[text])
    }
    const nameEverything = () => {
        const box = one("#box textarea")
        set(box, "aria-label", one("#box label > span")?.textContent.trim() ?? "")  // its label holds the buttons too
        set(one("#box .submit-button"), "aria-label", say.send)
        set(stopButton(), "aria-label", say.stop)
        for (const message of document.querySelectorAll("#chat [data-testid=user], #chat [data-testid=bot]")) {
            set(message, "role", "article")
            set(message, "aria-label", message.dataset.testid === "user" ? say.you : model)
        }
        const log = one("#chat [role=log]")
        set(log, "aria-label", say.chat)
        set(log, "aria-busy", String(Boolean(stopButton())))  // a growing answer is read once, at its end
        set(log, "tabindex", "0")  // it scrolls
        set(one("#speed"), "role", "status")
        set(one("#chat .examples"), "role", "group")  // of buttons, not a list
        set(one("#chat .examples"), "aria-label", say.examples)
        for (const example of document.querySelectorAll("#chat .examples button"))
            set(example, "aria-label", example.textContent.trim())
        for (const header of document.querySelectorAll(".toast-header")) set(header, "role", "group")  // has a button
        for (const title of document.querySelectorAll("#chat [role=button].title")) {  // of a folded tool call
            set(title, "aria-expanded", String(title.classList.contains("expanded")))
            for (const icon of title.querySelectorAll("button")) icon.inert = true  // a second button for the same
        }
        const chats = one("#chats [role=grid]")
        set(chats, "aria-label", one("#chats .label")?.textContent.trim() ?? "")
        for (const range of document.querySelectorAll("#side input[type=range]")) {
            const label = document.querySelector(`label[for="${range.id}"] span`)?.textContent.trim()
            if (!label) continue
            set(range, "aria-label", label)
            set(range.closest(".wrap")?.querySelector("input[type=number]"), "aria-label",
                say.number.replace("{label}", label))
        }
        if (language === "en") return
        for (const element of document.querySelectorAll("[aria-label]")) translate(element, "aria-label")
        for (const element of document.querySelectorAll("button[title]")) translate(element, "title")
        for (const text of document.querySelectorAll(".toast-title, .toast-text, .sr-only")) {
            const said = text.textContent.trim()
            if (Object.hasOwn(say.gradio, said)) text.textContent = say.gradio[said]
        }
    }

    // ------------------------------------------------------------------------------------------------- the sidebar

    const arrangeSide = () => {
        const side = one("#side")
        const content = side?.querySelector(".sidebar-content")
        if (!content) return
        const isOpen = side.classList.contains("open")
        if (content.inert === isOpen) content.inert = !isOpen  // what is out of sight is out of the Tab order too
        content.id ||= "side-content"
        const toggle = side.querySelector(".toggle-button")
        set(toggle, "aria-expanded", String(isOpen))
        set(toggle, "aria-controls", content.id)
    }

    // ------------------------------------------------------------------------------------------------ the keyboard

    document.addEventListener("keydown", event => {
        if (event.key !== "Escape" || event.isComposing || event.defaultPrevented) return
        if (event.target.closest("[role=listbox], [aria-expanded=true]:not(.toggle-button), dialog")) return
        const cancel = event.target.matches("#chat textarea") && one(`#chat button[aria-label="${say.cancel}"]`)
        if (cancel) cancel.click()
        else if (stopButton()) stopButton().click()
        else if (one("#side.open")) {
            one("#side .toggle-button").click()
            one("#side .toggle-button").focus()
        } else return
        event.preventDefault()
    })

    const refresh = () => {
        nameEverything()
        arrangeSide()
    }
    new MutationObserver(changes => {
        for (const change of changes) {
            if (change.attributeName === "aria-roledescription") showSource(change.target)
            if (change.type === "attributes") continue
            for (const node of change.type === "childList" ? change.addedNodes : [change.target])
                if (node.parentElement?.closest("#chat")) tidy(node)
        }
        refresh()
    }).observe(document.body, {
        attributes: true, attributeFilter: ["class", "aria-label", "aria-roledescription"],
        characterData: true, childList: true, subtree: true,
    })
    tidy(one("#chat") ?? document.body)
    refresh()
}
