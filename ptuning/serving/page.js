// What the page does in the browser beyond gradio's own means: keys, focus, and the text as it was written where
// gradio knows it only as Markdown. Called with the page's texts; kept() tells it what the browser keeps.
(texts) => {
  const words = texts[/^zh/i.test(navigator.language) ? "zh-CN" : "en"];
  const hasKeyboard = matchMedia("(pointer: fine)").matches;
  const find = (selector) => document.querySelector(selector);
  const box = () => find("#message textarea");
  const shown = () => (window.kept.mode === "both" ? ["tuned", "base"] : [window.kept.mode]);
  document.documentElement.lang = words === texts.en ? "en" : "zh";
  window.kept = { tuned: [], base: [], auto: [], mode: "tuned" };
  window.refused = `<p class="error" role="alert">${words.refused}</p>`;
  window.onKept = (kept) => {
    window.kept = kept;
    if (find("#other")) find("#other").style.display = kept.mode === "auto" && kept.other ? "block" : "none";
    if (document.activeElement === document.body) focus();
  };

  function focus() {
    if (hasKeyboard && box()) box().focus();  // on a phone it would open the keyboard
  }

  function fill(field, text) {
    field.value = text;
    field.dispatchEvent(new Event("input", { bubbles: true }));
  }

  // The text of a message as it was written.
  function written(row) {
    const chat = row.closest("#left, #right");
    const index = [...chat.querySelectorAll(".message-row")].indexOf(row);
    const turns = window.kept[shown()[chat.id === "left" ? 0 : 1]];
    return turns?.[index >> 1]?.[index % 2];
  }

  window.saveConversation = () => {
    const rows = shown().map((name) => window.kept[name]).filter((turns) => turns.length).map((turns) => ({
      messages: turns.flatMap(([question, answer]) => [
        { role: "user", content: question }, { role: "assistant", content: answer },
      ]),
    }));
    const link = document.createElement("a");
    const lines = rows.map((row) => JSON.stringify(row) + "\n").join("");
    link.href = URL.createObjectURL(new Blob([lines], { type: "application/json" }));
    link.download = "conversation.json";
    link.click();
    URL.revokeObjectURL(link.href);
  };

  // ---- copying: behind gradio's own copy, which has the Markdown

  let copied;
  document.addEventListener("click", (event) => {
    const panel = event.target.closest?.(".message-buttons");
    if (!panel || panel.querySelector("button") !== event.target.closest("button")) return;
    const text = written(panel.previousElementSibling);
    if (text === undefined) return;
    copied = text;  // for the copy event, where there is no clipboard to write to
    setTimeout(() => { copied = undefined; navigator.clipboard?.writeText(text); });
  }, true);
  document.addEventListener("copy", (event) => {
    if (copied === undefined) return;
    event.clipboardData.setData("text/plain", copied);
    event.preventDefault();
  });

  // ---- keys

  let recalled = 0;
  document.addEventListener("keydown", (event) => {
    if (event.isComposing) return;  // Chinese is typed: the keys are the input method's
    if (event.key === "Escape") find("#stop")?.click();
    if (event.target !== box()) return;
    const questions = window.kept[shown()[0]].map(([question]) => question);
    if (event.key === "ArrowUp" && (!box().value || box().value === questions.at(-recalled))) {
      if (recalled < questions.length) fill(box(), questions.at(-++recalled));
      event.preventDefault();
    } else if (event.key !== "ArrowUp") recalled = 0;
  });
  document.addEventListener("click", (event) => {
    if (event.target.closest?.("#submit, #stop, #clear, .example")) setTimeout(focus);
  });

  // ---- what gradio draws

  new MutationObserver(() => {
    for (const field of document.querySelectorAll(".edit-textarea:not([aria-label])")) {
      field.setAttribute("aria-label", words.edit);
      const text = written(field.closest(".message-row"));
      if (text !== undefined) fill(field, text);
    }
    // A screen reader reads the message itself, not its Markdown.
    for (const message of document.querySelectorAll("[data-testid=user][aria-label], [data-testid=bot][aria-label]")) {
      message.removeAttribute("aria-label");
    }
    for (const toast of document.querySelectorAll(".toast-body.error:not([role=alert])")) {
      const [title, text] = [".toast-title", "[data-testid=toast-text]"].map((part) => toast.querySelector(part));
      title.textContent = words.error;
      if (text?.textContent.includes("Connection to the server was lost")) text.textContent = words.lost;
      if (text?.textContent.includes("Queue is full")) text.textContent = words.busy;
      for (const name of ["role", "tabindex"]) title.closest(".toast-header").removeAttribute(name);  // a button holds none
      toast.setAttribute("role", "alert");
      toast.setAttribute("aria-live", "assertive");
    }
    for (const log of document.querySelectorAll("[role=log]")) {
      log.tabIndex = 0;  // the arrow keys scroll it
      const name = log.closest(".wrapper").querySelector("label").textContent.trim();
      if (log.getAttribute("aria-label") !== name) log.setAttribute("aria-label", name);
    }
    for (const button of document.querySelectorAll("button[aria-label='Copy message']")) {
      for (const name of ["title", "aria-label"]) button.setAttribute(name, words.copy);
    }
    find(".examples[role=list]")?.removeAttribute("role");  // its children are buttons
    const drawer = find(".sidebar .toggle-button:not([title])");
    for (const name of drawer ? ["title", "aria-label"] : []) drawer.setAttribute(name, words.settings);
  }).observe(document.body, { childList: true, subtree: true, attributeFilter: ["aria-label"] });
  // What is typed survives a reload, also the one with which gradio comes back to a server that was gone.
  addEventListener("pagehide", () => sessionStorage.setItem("typed", box()?.value ?? ""));
  if (sessionStorage.getItem("typed")) fill(box(), sessionStorage.getItem("typed"));
  focus();
}
