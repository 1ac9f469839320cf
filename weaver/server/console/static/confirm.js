// A question before something that cannot be taken back.
import { h } from "./dom.js";

/** Whether it was answered by the button `yes`; Escape and a click on Cancel are no. */
export function confirmed(title, words, yes) {
  const dialog = h("dialog", { class: "question", "aria-labelledby": "question-title", "aria-describedby": "question-words" },
    h("h2", { id: "question-title" }, title), h("p", { id: "question-words" }, words),
    h("form", { method: "dialog", class: "fields" },
      h("button", { value: "no" }, "Cancel"), h("button", { value: "yes", class: "primary" }, yes)));
  document.body.append(dialog);
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => {
    dialog.remove();
    resolve(dialog.returnValue === "yes");
  }));
}
