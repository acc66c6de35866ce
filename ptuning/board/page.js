// What the page does in the browser beyond gradio's own means. Called with the page's texts.
(texts) => {
  const words = texts[/^zh/i.test(navigator.language) ? "zh-CN" : "en"];
  document.documentElement.lang = words === texts.en ? "en" : "zh";
  new MutationObserver(() => {
    for (const toast of document.querySelectorAll(".toast-body.error:not([role=alert])")) {
      const [title, text] = [".toast-title", "[data-testid=toast-text]"].map((part) => toast.querySelector(part));
      if (title) title.textContent = words.error;
      if (text && /connection|lost|fetch/i.test(text.textContent)) text.textContent = words.lost;
      for (const name of ["role", "tabindex"]) title?.closest(".toast-header")?.removeAttribute(name);  // a button holds none
      toast.setAttribute("role", "alert");
    }
    const log = document.querySelector("#tail pre");
    if (log && !log.dataset.placed) {  // what was printed last is read first
      log.dataset.placed = "yes";
      log.scrollTop = log.scrollHeight;
    }
  }).observe(document.body, { childList: true, subtree: true });
}
