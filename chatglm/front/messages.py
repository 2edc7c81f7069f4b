"""What the front doors say to a person, in Chinese and English."""

from __future__ import annotations

#: Texts of the terminal chat: key -> language -> text.
TERMINAL: dict[str, dict[str, str]] = {
    "demo": {
        "zh": (
            "注意：这只是随软件附带的微型演示模型（约 {millions} 百万参数），不是 ChatGLM-6B。\n"
            "它只会简单的寒暄、算术、换算和翻译。\n"
            "要使用真正的模型：{command} --model 模型文件夹（或设置环境变量 CHATGLM_MODEL）"
        ),
        "en": (
            "Note: this is only the tiny demo model that comes with the software ({millions} million parameters), not\n"
            "ChatGLM-6B. It can do small talk, sums, unit conversions and simple translations, no more.\n"
            "For a real model: {command} --model FOLDER (or set the environment variable CHATGLM_MODEL)"
        ),
    },
    "demo_vision": {
        "zh": (
            "注意：这只是随软件附带的微型演示模型（约 {millions} 百万参数），不是 VisualGLM-6B。\n"
            "它只认得纯色的圆形、正方形、三角形、星形、十字和单个数字。\n"
            "要使用真正的模型：{command} --model 模型文件夹（或设置环境变量 CHATGLM_MODEL）"
        ),
        "en": (
            "Note: this is only the tiny demo model that comes with the software ({millions} million parameters), not\n"
            "VisualGLM-6B. It knows plain circles, squares, triangles, stars, crosses and single digits, no more.\n"
            "For a real model: {command} --model FOLDER (or set the environment variable CHATGLM_MODEL)"
        ),
    },
    "welcome_vision": {
        "zh": "先给出一张图片，再就它提问。clear 换一张图片，stop 退出，/help 查看更多命令。",
        "en": "Give a picture, then ask about it. clear takes the next picture, stop ends, /help lists more commands.",
    },
    "picture": {
        "zh": "图片路径（直接回车则不看图，stop 退出）：",
        "en": "Picture file (Enter for none, stop ends): ",
    },
    "describe": {"zh": "描述这张图片。", "en": "Describe this picture."},
    "blind": {
        "zh": "{name} 不能看图：请给出 VisualGLM-6B 的文件夹（--model）",
        "en": "{name} sees no pictures: give the folder of a VisualGLM-6B (--model)",
    },
    "welcome": {
        "zh": "欢迎使用 ChatGLM。输入内容即可对话；/help 查看命令，/clear 清空对话，/quit 退出，Ctrl-C 中止回答。",
        "en": "Welcome: type to chat. /help lists commands, /clear starts over, /quit ends, Ctrl-C stops an answer.",
    },
    "welcome_complete": {
        "zh": "续写：输入文本，模型接着写。\"\"\" 开始和结束多行文本，/quit 退出，Ctrl-C 中止。",
        "en": "Completion: type a text and the model continues it. \"\"\" begins and ends several lines, /quit ends.",
    },
    "user": {"zh": "用户：", "en": "You: "},
    "more": {"zh": "……", "en": "... "},
    "observation": {"zh": "工具结果：", "en": "Tool result: "},
    "assistant": {"zh": "ChatGLM：", "en": "ChatGLM: "},
    "help": {
        "zh": """\
/help               显示本帮助
/clear（或 clear）   清空对话
/undo               撤回上一轮
/regen              重新生成上一个回答
/system [文字]       设置系统提示并清空对话；不带文字则取消（仅 ChatGLM3）
/set [名称 值]       修改生成参数（值为 default 则恢复默认）；不带参数则显示全部
/save 文件          保存对话
/load 文件          读入对话
/quit（或 stop）     退出，Ctrl-D 也可以
\"\"\" ... \"\"\"         多行输入
Ctrl-C              中止当前回答""",
        "en": """\
/help               this help
/clear (or clear)   start over
/undo               take the last turn back
/regen              answer the last question again
/system [TEXT]      set the system prompt and start over; no TEXT removes it (ChatGLM3 only)
/set [NAME VALUE]   change a setting (VALUE "default" restores it); no NAME shows all
/save FILE          save the conversation
/load FILE          continue a saved conversation
/quit (or stop)     exit, as Ctrl-D does
\"\"\" ... \"\"\"         input of several lines
Ctrl-C              stop the answer""",
    },
    "cleared": {"zh": "（对话已清空）", "en": "(conversation cleared)"},
    "undone": {"zh": "（已撤回上一轮）", "en": "(last turn taken back)"},
    "nothing": {"zh": "（还没有对话）", "en": "(there is no turn yet)"},
    "system": {"zh": "（系统提示已设置，对话已清空）", "en": "(system prompt set, conversation cleared)"},
    "settings": {"zh": "（{values}）", "en": "({values})"},
    "saved": {"zh": "（已保存到 {path}）", "en": "(saved to {path})"},
    "loaded": {"zh": "（已读入 {path}）", "en": "(loaded {path})"},
    "needs_file": {"zh": "请写明文件名：{command} 文件", "en": "give a file name: {command} FILE"},
    "unknown": {
        "zh": "没有 {command} 这个命令，/help 查看全部命令",
        "en": "there is no command {command}; /help lists them",
    },
    "not_text": {
        "zh": "输入不是 {encoding} 文本，未发送",
        "en": "the input is not {encoding} text and was not sent",
    },
    "tool": {"zh": "[调用工具] {name} {parameters}", "en": "[tool call] {name} {parameters}"},
    "code": {"zh": "[代码]\n{code}", "en": "[code]\n{code}"},
    "seen": {"zh": "[结果] {text}", "en": "[result] {text}"},
    "confirm": {"zh": "执行吗？[y/N] ", "en": "Run it? [y/N] "},
    "refused": {
        "zh": "（未执行：无人可确认；--yes 表示一律同意）",
        "en": "(not run: nobody can be asked; --yes agrees to everything)",
    },
    "rounds": {"zh": "（调用次数已达上限）", "en": "(no further calls for this question)"},
    "repeated": {"zh": "（模型重复同一调用，已停止）", "en": "(the model repeats the same call: stopped)"},
    "files": {"zh": "（文件：{names}，在 {folder} 中）", "en": "(files: {names}, in {folder})"},
    "trusted": {
        "zh": "注意：代码不经隔离，以你的权限运行，可以读取你的全部文件",
        "en": "Note: code runs without isolation, with your rights, and can read all your files",
    },
    "reading": {
        "zh": "（正在从标准输入读取，到其结束为止；没有文档时请加 < /dev/null）",
        "en": "(reading standard input to its end; add < /dev/null if there is no document)",
    },
    "no_history": {
        "zh": "（输入历史不会保存：{reason}）",
        "en": "(input history is not kept: {reason})",
    },
    "broken": {
        "zh": "无法导入 {name}（{reason}）；python -m chatglm.doctor 会指出原因和解决办法",
        "en": "cannot import {name} ({reason}); python -m chatglm.doctor says why, and what to do",
    },
    "missing": {"zh": "未安装 {names}：{command}", "en": "{names} is not installed: {command}"},
    "interrupt": {"zh": "（/quit 或 Ctrl-D 退出）", "en": "(/quit or Ctrl-D exits)"},
    "speed": {
        "zh": "[{tokens} 个词元，{rate:.1f} 词元/秒{note}]",
        "en": "[{tokens} tokens, {rate:.1f} tokens/s{note}]",
    },
    "length": {"zh": "，达到长度上限", "en": ", length limit reached"},
    "cancelled": {"zh": "，已中止", "en": ", stopped"},
    "bye": {"zh": "再见！", "en": "Bye!"},
    "error": {"zh": "错误：{reason}", "en": "Error: {reason}"},
    "newer": {
        "zh": "注意：比测试过的版本新：{names}。若有异常，请运行 python -m chatglm.doctor",
        "en": "Note: newer than the tested versions: {names}. If anything misbehaves, run python -m chatglm.doctor",
    },
    "quantised": {
        "zh": "加载并量化用了 {seconds} 秒；--save-quantized 文件夹 可保存 INT{bits} 的结果，以后用 --model 指定它",
        "en": "Loading and quantising took {seconds} s; --save-quantized FOLDER keeps the INT{bits} result "
        "for --model FOLDER",
    },
    "stored": {
        "zh": "已保存量化后的模型；以后使用 --model {folder}",
        "en": "The quantised model is stored; from now on: --model {folder}",
    },
}

#: Texts of the web page: key -> language -> text.
PAGE: dict[str, dict[str, str]] = {
    "demo_vision": {
        "zh": (
            "这只是随软件附带的微型演示模型（约 {millions} 百万参数），不是 VisualGLM-6B；它只认得纯色的圆形、正方形、"
            "三角形、星形、十字和单个数字。要使用真正的模型：`python web_demo_vision.py --model 模型文件夹`"
        ),
        "en": (
            "This is only the tiny demo model that comes with the software ({millions} million parameters), not "
            "VisualGLM-6B. It knows plain circles, squares, triangles, stars, crosses and single digits, no more. "
            "For a real model: `python web_demo_vision.py --model FOLDER`"
        ),
    },
    "picture": {"zh": "图片（上传、拖入或粘贴）", "en": "Picture (upload, drop or paste)"},
    "picture_first": {
        "zh": "给出一张图片，模型会立即描述它；然后可以继续提问。",
        "en": "Give a picture: the model describes it at once, and you can ask more.",
    },
    "clear": {"zh": "清空", "en": "Clear"},
    "demo": {
        "zh": (
            "这只是随软件附带的微型演示模型（约 {millions} 百万参数），不是 ChatGLM-6B；"
            "它只会简单的寒暄、算术、换算和翻译。要使用真正的模型：`python web_demo.py --model 模型文件夹`"
        ),
        "en": (
            "This is only the tiny demo model that comes with the software ({millions} million parameters), not "
            "ChatGLM-6B. It can do small talk, sums, unit conversions and simple translations, no more. "
            "For a real model: `python web_demo.py --model FOLDER`"
        ),
    },
    "placeholder": {"zh": "你好，有什么可以帮你？", "en": "Hello! What can I do for you?"},
    "question": {"zh": "输入消息，回车发送，Shift+回车换行", "en": "Message: Enter sends, Shift+Enter is a new line"},
    "observation": {"zh": "模型调用了工具，请输入工具的结果", "en": "The model called a tool: enter its result"},
    "new": {"zh": "新对话", "en": "New chat"},
    "delete": {"zh": "删除此对话", "en": "Delete this chat"},
    "chats": {"zh": "历史对话（只保存在此浏览器中）", "en": "Chats (kept in this browser only)"},
    "search": {"zh": "搜索对话", "en": "Search the chats"},
    "rename": {"zh": "此对话的标题", "en": "Title of this chat"},
    "export_markdown": {"zh": "导出此对话（Markdown）", "en": "Export this chat (Markdown)"},
    "export_json": {"zh": "导出此对话（JSON）", "en": "Export this chat (JSON)"},
    "export_all": {"zh": "导出全部对话（JSON）", "en": "Export all chats (JSON)"},
    "import": {"zh": "导入对话", "en": "Import chats"},
    "imported": {"zh": "已导入 {count} 个对话。", "en": "Chats imported: {count}."},
    "not_a_chat": {
        "zh": "{file} 不是此模型的对话，已跳过。",
        "en": "{file} holds no chat of this model and was left out.",
    },
    "logout": {"zh": "退出登录", "en": "Log out"},
    "interrupted": {"zh": "回答在此中断", "en": "The answer was interrupted here"},
    "two_chats": {
        "zh": "另一个标签页同时改动了此对话，因此两份都保留为单独的对话。",
        "en": "Another tab has changed this chat at the same time, so both are kept, as two chats.",
    },
    "store_almost_full": {
        "zh": "此浏览器为本页保存的内容已用去约 {percent}%。存满之后的对话不再保存，请导出并删除不需要的对话。",
        "en": "The browser's store for this page is about {percent}% full. Once it is full, chats are no longer kept: "
        "export and delete those that you do not need.",
    },
    "store_full": {
        "zh": "此浏览器的存储空间已满：此对话尚未保存，只在本标签页中。请导出它，或删除其他对话。",
        "en": "The browser's store is full: this chat is in this tab only. Export it, or delete others.",
    },
    "store_blocked": {
        "zh": "此浏览器不允许本页保存内容：对话只在本标签页中，重新载入后就没有了。",
        "en": "This browser lets the page keep nothing: chats are in this tab only and end with it.",
    },
    "settings": {"zh": "设置", "en": "Settings"},
    "model": {"zh": "模型", "en": "Model"},
    "system": {"zh": "系统提示", "en": "System prompt"},
    "mode": {"zh": "模式（各有各的对话）", "en": "Mode (each has chats of its own)"},
    "auto": {"zh": "不询问，直接运行工具和代码", "en": "Run tools and code without asking"},
    "pending": {"zh": "模型要运行（可先修改）", "en": "The model wants to run this (you may edit it first)"},
    "run": {"zh": "运行", "en": "Run"},
    "refuse": {"zh": "不运行", "en": "Do not run"},
    "running": {"zh": "正在运行……", "en": "Running …"},
    "no_call": {"zh": "没有等待运行的调用", "en": "No call waits to be run"},
    "upload": {"zh": "上传文件给代码", "en": "Upload files for the code"},
    "upload_large": {"zh": "文件太大：一次最多 2.5 MB", "en": "The files are too large: at most 2.5 MB at a time"},
    "uploaded": {
        "zh": "已上传：{names}；随下一个问题告诉模型",
        "en": "Uploaded: {names}. The model learns of it with your next question",
    },
    "made": {"zh": "代码的文件", "en": "Files of the code"},
    "fetch": {"zh": "下载", "en": "Download"},
    "no_file": {"zh": "没有选择文件，或文件超过 16 MB", "en": "No file is chosen, or it is larger than 16 MB"},
    "restart": {"zh": "重启代码内核", "en": "Restart the code's kernel"},
    "restarted": {"zh": "内核已重启，变量已清空", "en": "The kernel was restarted, its variables are gone"},
    "kernels_busy": {"zh": "代码内核都在忙，请稍后再试", "en": "All of the server's kernels are busy: try again later"},
    "tools": {"zh": "工具（JSON 或 YAML 列表）", "en": "Tools (a list in JSON or YAML)"},
    "max_length": {"zh": "最大长度", "en": "Maximum length"},
    "max_length_info": {
        "zh": "提示与回答的词元总数；0 为模型上限",
        "en": "Tokens of prompt and answer; 0: the model's maximum",
    },
    "top_p": {"zh": "Top P", "en": "Top P"},
    "temperature": {"zh": "温度", "en": "Temperature"},
    "temperature_info": {"zh": "0 为总取最可能的词元", "en": "0: always the likeliest token"},
    "box": {"zh": "消息", "en": "Message"},
    "reading": {"zh": "正在读题……", "en": "Reading the question …"},
    "next": {"zh": "排队中，下一个就轮到你", "en": "Waiting, you are next"},
    "waiting": {"zh": "排队中，前面还有 {before} 个请求", "en": "Waiting, {before} before you"},
    "busy": {"zh": "还在回答，请先停止", "en": "Still answering: stop it first"},
    "full": {
        "zh": "排队的人太多，请 {seconds} 秒后再试",
        "en": "Too many requests are waiting: try again in {seconds} s",
    },
    "stopping": {"zh": "服务器正在关闭", "en": "The server is shutting down"},
    "no_room": {
        "zh": "问题太长（{needed} 个词元，最多 {room} 个）：请缩短，或调大“最大长度”",
        "en": "The question is too long ({needed} tokens, at most {room}): shorten it, or raise Maximum length",
    },
    "no_memory": {
        "zh": "问题太长，服务器的内存放不下：请缩短",
        "en": "The question is too long for the server's memory: shorten it",
    },
    "not_finite": {
        "zh": "模型算出了无效的数值（NaN），详见服务器日志",
        "en": "The model computed invalid numbers (NaN); the server's log says why",
    },
    "too_large": {
        "zh": "请求太大，最多 {bytes} 字节、{values} 个值",
        "en": "The request is too large: at most {bytes} bytes and {values} values",
    },
    "too_slow": {"zh": "请求发送得太慢", "en": "The request took too long to arrive"},
    "too_many": {"zh": "服务器正忙，请稍后再试", "en": "The server is busy: try again later"},
    "too_long": {"zh": "消息太长", "en": "The message is too long"},
    "internal": {"zh": "服务器内部错误，详见其日志", "en": "The server failed; its log says why"},
    "tools_json": {
        "zh": "工具须为 JSON 或 YAML 列表：{reason}",
        "en": "The tools must be a list in JSON or YAML: {reason}",
    },
}

#: Names that the page gives to parts of gradio's components: key -> language -> text.
NAMES: dict[str, dict[str, str]] = {
    "send": {"zh": "发送", "en": "Send"},
    "stop": {"zh": "停止（Esc）", "en": "Stop (Esc)"},
    "you": {"zh": "你", "en": "You"},
    "edit": {"zh": "修改问题", "en": "Edit the question"},
    "cancel": {"zh": "取消", "en": "Cancel"},  # as gradio names the button
    "chat": {"zh": "对话", "en": "Conversation"},
    "examples": {"zh": "示例", "en": "Examples"},
    "number": {"zh": "{label}（数值）", "en": "{label} (number)"},
    "copy_code": {"zh": "复制代码", "en": "Copy code"},
    "diagram": {"zh": "图无法绘制，其源码如下：", "en": "This diagram cannot be drawn; its source:"},
    "done": {"zh": "已完成", "en": "done"},
    "to_do": {"zh": "未完成", "en": "to do"},
}
#: What gradio says in English only -> Chinese.
GRADIO: dict[str, str] = {
    "Toggle Sidebar": "打开或关闭侧栏",
    "Copy message": "复制消息",
    "Copied message": "已复制",
    "Scroll down": "滚动到底部",
    "Loading response": "正在等待回答",
    "Loading content": "正在载入",
    "Reset to default value": "恢复默认值",
    "Close": "关闭",
    "Error": "出错了",
    "Warning": "注意",
    "Info": "提示",
    "An error occurred.": "出错了。",
    "Connection Lost": "连接已断开",
    "Connection to the server was lost. Attempting reconnection...": "与服务器的连接已断开，正在重新连接……",
    "Connection errored out.": "无法连接服务器。",
    "Could not parse server response": "无法理解服务器的回复",
    "This application is currently busy. Please try again.": "服务器正忙，请稍后再试。",
}
