"use strict";
(() => {
  const controls = document.querySelector(".controls");
  const readout = document.getElementById("readout");

  // Without a script every panel is there, one below the other; with it, one choice at a time.
  const choose = () => {
    for (const select of controls.querySelectorAll("select")) {
      const attribute = select.name === "peer" ? "forPeer" : "forThreads";
      for (const part of document.querySelectorAll(`[data-for-${select.name}]`)) {
        part.dataset[`hide${select.name}`] = part.dataset[attribute] === select.value ? "" : "1";
      }
    }
    for (const part of document.querySelectorAll("[data-for-peer], [data-for-threads]")) {
      part.hidden = Boolean(part.dataset.hidepeer || part.dataset.hidethreads);
    }
  };
  if (controls) {
    controls.hidden = false;
    controls.addEventListener("change", choose);
    choose();
  }

  // Pointers that hover get titles from the browser; fingers get the same text at the bottom.
  document.addEventListener("click", (event) => {
    const pointed = event.target.closest("td[title], .mark");
    readout.hidden = !pointed;
    if (pointed) {
      readout.textContent = pointed.getAttribute("title") || pointed.querySelector("title").textContent;
    }
  });

  const search = document.getElementById("search");
  search.closest("p").hidden = false;
  search.addEventListener("input", () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const body of document.querySelectorAll(".everything tbody")) {
      body.hidden = !words.every((word) => body.dataset.case.includes(word));
      shown += body.hidden ? 0 : 1;
    }
    document.getElementById("found").textContent = words.length ? `${shown} shown` : "";
  });
})();
