"use strict";
// Search and choice over records. An area ([data-records]) has one toolbar and sections ([data-group]) of records
// ([data-card]). Without this script all of them are there to be read.
for (const area of document.querySelectorAll("[data-records]")) {
  const toolbar = area.querySelector("[data-toolbar]");
  const search = toolbar.querySelector("input");
  const found = toolbar.querySelector("[role=status]");
  const choices = [...toolbar.querySelectorAll("[data-choice]")];
  const plain = (text) => text.normalize("NFKC").toLowerCase();
  const sections = [...area.querySelectorAll("[data-group]")].map((section) => ({
    section,
    cards: [...section.querySelectorAll("[data-card]")].map((card) => ({ card, text: null })),
  }));
  let chosen = "";

  const apply = () => {
    const words = plain(search.value).split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const { section, cards } of sections) {
      const open = !chosen || section.dataset.group === chosen;
      let here = 0;
      for (const entry of cards) {
        if (open && words.length && entry.text === null) entry.text = plain(entry.card.textContent);
        const fits = open && words.every((word) => entry.text.includes(word));
        entry.card.hidden = !fits;
        here += fits;
      }
      section.hidden = !here;
      shown += here;
    }
    found.textContent = shown === 1 ? "1 record shown" : shown.toLocaleString("en") + " records shown";
  };
  const choose = (name) => {
    chosen = name;
    for (const choice of choices) choice.setAttribute("aria-pressed", String(choice.dataset.choice === name));
    apply();
  };

  for (const choice of choices) choice.addEventListener("click", () => choose(choice.dataset.choice));
  search.addEventListener("input", apply);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && (search.value || chosen)) {
      search.value = "";
      choose("");
    } else if (event.key === "/" && !event.ctrlKey && !event.metaKey && !/^(INPUT|TEXTAREA)$/.test(event.target.tagName)) {
      event.preventDefault();
      search.focus();
    }
  });
  toolbar.hidden = false;
  apply();
}
