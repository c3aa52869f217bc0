//! A small file system of its own for a test: ext4 on a file, without blocks that are kept for root. Needs root.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Unmounted when dropped, whoever still uses it.
pub(crate) struct Disk {
    at: PathBuf,
}

impl Disk {
    /// Makes a file system of so many bytes in the file `image`, and mounts it at `at`.
    pub(crate) fn mount(image: &Path, bytes: u64, at: &Path) -> Self {
        File::create(image).and_then(|file| file.set_len(bytes)).expect("an image");
        std::fs::create_dir(at).expect("a directory");
        must("mkfs.ext4", &["-q", "-m", "0", "-b", "4096"], &[image]);
        must("mount", &["-o", "loop"], &[image, at]);
        Self { at: at.to_owned() }
    }

    /// Takes every block that is left, as another user of the file system would.
    pub(crate) fn take_all(&self, into: &str) {
        let mut ballast =
            File::options().create(true).append(true).open(self.at.join(into)).expect("a file of ours");
        for bytes in [1 << 20, 64 << 10, 4096, 1] {
            while ballast.write_all(&vec![0xb; bytes]).is_ok() {}
        }
        let _ = ballast.sync_all();
    }

    /// Gives back what [`Disk::take_all`] took.
    pub(crate) fn give_back(&self, from: &str) {
        std::fs::remove_file(self.at.join(from)).expect("a file of ours");
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.at).stderr(Stdio::null()).status();
    }
}

fn must(program: &str, arguments: &[&str], paths: &[&Path]) {
    let output = Command::new(program).args(arguments).args(paths).output();
    let output = output.unwrap_or_else(|error| panic!("{program} does not start: {error}"));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} (it needs root): {error}");
}
