//! The per-node agent: anoints a server, supervises, hands out connections.
