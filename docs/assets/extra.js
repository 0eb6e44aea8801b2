// Flags stay whole at the end of a line, and the search finds them as people type them.
for (const code of document.querySelectorAll(".md-typeset code")) {
  const texts = document.createTreeWalker(code, NodeFilter.SHOW_TEXT), found = [];
  while (texts.nextNode()) found.push(texts.currentNode);
  for (const text of found.filter((node) => node.data.includes("-"))) {
    text.replaceWith(...text.data.split(/(\s+)/).map((word) => {
      if (!word.includes("-")) return word;
      const whole = document.createElement("span");
      whole.className = "whole";
      whole.textContent = word;
      return whole;
    }));
  }
}

// On a phone, the two columns of such a table stand one above the other (extra.css).
for (const table of document.querySelectorAll(".md-typeset table:not([class])")) {
  if (table.rows[0].cells.length === 2) table.closest(".md-typeset__table, div")?.classList.add("pairs");
}

// The search takes a dash at the beginning of a word for "without".
document.addEventListener("input", (event) => {
  if (event.target.matches?.("[data-md-component=search-query]")) {
    const found = event.target.value.replace(/(^|\s)-+(?=\w)/g, "$1");
    if (found !== event.target.value) event.target.value = found;
  }
}, true);
