//! NBD server in front of any export.
