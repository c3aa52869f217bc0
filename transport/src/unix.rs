//! Unix sockets: made for owner and group, and who connects is looked at.

use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use rustix::fs::Mode;
use tokio::net::{UnixListener, UnixStream};

/// What is taken away from a new socket: everything of others, and execution. It is left with 0660 from its first moment.
const UMASK: u32 = 0o117;

/// A socket, and whose it is.
#[derive(Debug)]
pub struct Listener {
    listener: UnixListener,
    group: u32,
}

/// Binds a socket. One that nobody listens on is stale, and makes room. Not for processes with several threads: what is
/// taken away from new files is the whole process's.
///
/// # Errors
/// When somebody listens there, something else is there, or it cannot be made.
pub fn listen(path: &Path) -> io::Result<Listener> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "something else is there"));
        }
        Ok(_) if std::os::unix::net::UnixStream::connect(path).is_ok() => {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        Ok(_) => std::fs::remove_file(path)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let before = rustix::process::umask(Mode::from_raw_mode(UMASK));
    let listener = UnixListener::bind(path);
    rustix::process::umask(before);
    let group = std::fs::metadata(path)?.gid();
    Ok(Listener { listener: listener?, group })
}

impl Listener {
    /// The next connection, and who made it; or why they may not.
    ///
    /// # Errors
    /// When none can be accepted now.
    pub async fn accept(&self) -> io::Result<(UnixStream, Result<String, String>)> {
        let (stream, _) = self.listener.accept().await?;
        let who = admit(&stream, self.group);
        Ok((stream, who))
    }
}

/// Root, the user that we are, or the socket's group. The socket's mode says the same; it can be changed by mistake.
fn admit(stream: &UnixStream, group: u32) -> Result<String, String> {
    let peer = stream.peer_cred().map_err(|error| format!("no credentials: {error}"))?;
    let own = rustix::process::geteuid().as_raw();
    let pid = peer.pid().unwrap_or(0);
    let who = format!("unix socket, user {}, process {pid}", peer.uid());
    if peer.uid() == 0 || peer.uid() == own || peer.gid() == group || has_group(pid, group) {
        return Ok(who);
    }
    Err(format!("{who}: neither root, nor user {own}, nor of group {group}"))
}

/// Whether a process has a group beside its own, as far as it can be told.
fn has_group(pid: i32, group: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let groups = status.lines().find_map(|line| line.strip_prefix("Groups:")).unwrap_or_default();
    groups.split_whitespace().any(|found| found.parse() == Ok(group))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[tokio::test]
    async fn a_socket_is_for_owner_and_group() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("s");
        let listener = listen(&path).expect("binds");
        assert_eq!(std::fs::metadata(&path).expect("is there").permissions().mode() & 0o777, 0o660);
        let error = listen(&path).expect_err("in use");
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        // The attempt connected once, and so do we.
        let _ours = UnixStream::connect(&path).await.expect("connects");
        let (_, who) = listener.accept().await.expect("accepts");
        assert!(who.expect("our own user").contains("process"));
        drop(listener);
        listen(&path).expect("a stale one makes room");
    }

    #[tokio::test]
    async fn what_is_no_socket_stays() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("precious");
        std::fs::write(&path, b"x").expect("writes");
        assert_eq!(listen(&path).expect_err("refused").kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read(&path).expect("still there"), b"x");
    }

    /// Connects as another user, of this group; whether it got that far.
    async fn connect_as_nobody(path: &Path, group: u32) -> bool {
        const CONNECT: &str = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])";
        let mut python = tokio::process::Command::new("python3");
        python.args(["-c", CONNECT]).arg(path).uid(65534).gid(group).stderr(std::process::Stdio::null());
        python.status().await.expect("python3 starts").success()
    }

    #[tokio::test]
    async fn other_users_do_not_come_in() {
        if !rustix::process::geteuid().is_root() {
            println!("only root can be somebody else: not tested");
            return;
        }
        let mode = |path: &Path, mode| {
            std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).expect("is ours");
        };
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("s");
        let listener = listen(&path).expect("binds");
        mode(dir.path(), 0o755);
        assert!(!connect_as_nobody(&path, 65534).await, "the socket's mode keeps them out");
        assert!(connect_as_nobody(&path, listener.group).await, "its group comes in");
        listener.accept().await.expect("accepts").1.expect("of the group");
        // Somebody opened it for everybody by mistake.
        mode(&path, 0o666);
        assert!(connect_as_nobody(&path, 65534).await);
        let why = listener.accept().await.expect("accepts").1.expect_err("refused all the same");
        assert!(why.contains("user 65534") && why.contains("neither root"), "{why}");
    }

    #[test]
    fn groups_of_a_process_are_found() {
        let own = i32::try_from(std::process::id()).expect("small");
        assert!(!has_group(own, u32::MAX - 7));
        assert!(!has_group(-1, 0));
    }
}
