//! Backends on a real file system.
