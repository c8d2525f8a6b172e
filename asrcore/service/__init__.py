"""Long-running processes: the replication service, process servers, and what components say to each other.

- Scheduling: `scheduler`, `due` and `pool` run the cycles that are due (`asr run`); `member`, `assign` and `servers`
  share a vault between process servers; `status` and `logs` report.
- Connections between components: `tls`, `carrier`, `channel`, `listener`, with `packing`, `pace` and `failures`.
- A site served elsewhere: `master_target`, `served` and `calls` on its side; the driver `remote` on the engine's side.
- The configuration server: `api`, `web` and `metrics`; `authority` issues certificates, `joining` enrols a component.
"""
