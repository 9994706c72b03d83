"""Workloads, load generator, metrics and reports of `memserve bench`: speaks HTTP to any OpenAI-compatible
server, and imports neither torch nor anything of router/ or workers/."""
