//! The session against a played etcd, table by table; what agents make of it is tested in `core/tests/etcd.rs`.

pub(crate) mod model;
mod played;
mod rules;
