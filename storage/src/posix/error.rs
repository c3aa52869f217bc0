//! The one place where an errno becomes a [`StorageError`].

use rustix::io::Errno;

use crate::StorageError;

/// What `errno` of the system call `what` on `path` means to a caller.
pub(super) fn storage_error(path: &str, what: &'static str, errno: Errno) -> StorageError {
    let path = path.to_owned();
    match errno {
        Errno::NOENT => StorageError::NotFound { path },
        Errno::EXIST => StorageError::Exists { path },
        Errno::NOSPC | Errno::DQUOT => StorageError::NoSpace { path },
        _ => {
            let text = errno.to_string();
            let reason = text.split(" (os error").next().unwrap_or_default().to_owned();
            StorageError::Io { path, what, errno: errno.raw_os_error(), reason }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn callers_can_tell_what_they_branch_on() {
        let of = |errno| storage_error("f", "write", errno);
        assert_eq!(of(Errno::NOENT), StorageError::NotFound { path: "f".into() });
        assert_eq!(of(Errno::EXIST), StorageError::Exists { path: "f".into() });
        assert_eq!(of(Errno::NOSPC), StorageError::NoSpace { path: "f".into() });
        assert_eq!(of(Errno::DQUOT), StorageError::NoSpace { path: "f".into() });
        assert_eq!(of(Errno::IO).to_string(), "f: write failed: Input/output error (errno 5)");
    }
}
