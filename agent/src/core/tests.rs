//! Several agent cores and the real lockd core in one virtual world: processes are played, time is a number, the
//! network is cut by the test. Named for what must hold.

mod anointing;
mod chaos;
mod etcd;
mod local;
mod played;
mod world;
