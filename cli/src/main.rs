//! The one binary of csnap.
fn main() {}
