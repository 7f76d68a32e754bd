"""tproxyd beside its peers, on one machine and in one run: `make bench`, `make soak`; see docs/performance.md.

| file | what lives there |
|---|---|
| `subjects` | what is measured: tproxyd, HAProxy, V2Ray, kernel routing |
| `bed` | client - gateway - server for one subject, the servers, and the witness that its flows were relayed |
| `load`, `generators/` | the load generators, and how their output is read |
| `workloads` | what is measured with them |
| `measure` | CPU time, memory, versions |
| `runner` | the rounds |
| `results`, `targets` | samples, medians, ratios; what tproxyd is to reach |
| `report`, `chart` | a table, JSON, an SVG |
| `soak` | correctness at speed |
"""
