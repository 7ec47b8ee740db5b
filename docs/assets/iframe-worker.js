// Browsers start no Worker from file://, and the search runs in one. Here its script runs in a hidden frame instead.
if (location.protocol === "file:")
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      frame.answer = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      frame.srcdoc = `<script>postMessage = frameElement.answer</script><script src="${url}"></script>`;
      const started = new Promise((resolve) => (frame.onload = resolve));
      this.postMessage = (data) =>
        started.then(() => frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })));
      document.body.append(frame);
    }
  };
