//! The simulated disk's whole state: a tree of names over numbered files and directories. Cheap to clone: files are
//! shared until one copy changes them.
//!
//! No handle, node or operation in flight is part of it; those are the running world's (`world`).

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use super::dir::{DirData, Inode};
use super::file::FileData;
use super::rng::Digest;
use crate::{BLOCK_BYTES, Result, Stat, StorageError};

/// The directory that every path starts at.
pub(super) const ROOT: Inode = 1;
/// What `statvfs` reports of a disk without a limit: 1 PiB.
const UNLIMITED_BYTES: u64 = 1 << 50;
/// Device number of every file.
const DEVICE: u64 = 0x51;

const EPERM: i32 = 1;
const ENOTDIR: i32 = 20;
const EISDIR: i32 = 21;
const EINVAL: i32 = 22;
const ENOTEMPTY: i32 = 39;

/// A file or a directory.
#[derive(Clone, Debug)]
pub(super) enum Node {
    File(FileData),
    Dir(DirData),
}

/// The medium and the cache above it, which all nodes share.
#[derive(Clone, Debug)]
pub(super) struct State {
    nodes: BTreeMap<Inode, Rc<Node>>,
    next_inode: Inode,
    seq: u64,
    pub(super) capacity_bytes: Option<u64>,
}

impl State {
    pub(super) fn new() -> Self {
        let root = Rc::new(Node::Dir(DirData::default()));
        Self { nodes: BTreeMap::from([(ROOT, root)]), next_inode: ROOT + 1, seq: 0, capacity_bytes: None }
    }

    /// The position of the newest change.
    pub(super) fn seq(&self) -> u64 {
        self.seq
    }

    /// Starts a change: its position.
    pub(super) fn next_seq(&mut self) -> u64 {
        self.seq += 1;
        self.seq
    }

    pub(super) fn nodes(&self) -> impl Iterator<Item = (Inode, &Node)> {
        self.nodes.iter().map(|(inode, node)| (*inode, node.as_ref()))
    }

    /// The file of an open handle. Handles keep their files.
    pub(super) fn file(&self, inode: Inode) -> &FileData {
        match self.nodes.get(&inode).map(Rc::as_ref) {
            Some(Node::File(file)) => file,
            _ => unreachable!("inode {inode} of an open file is a file"),
        }
    }

    pub(super) fn file_mut(&mut self, inode: Inode) -> &mut FileData {
        match self.nodes.get_mut(&inode).map(Rc::make_mut) {
            Some(Node::File(file)) => file,
            _ => unreachable!("inode {inode} of an open file is a file"),
        }
    }

    pub(super) fn dir_mut(&mut self, inode: Inode) -> &mut DirData {
        match self.nodes.get_mut(&inode).map(Rc::make_mut) {
            Some(Node::Dir(dir)) => dir,
            _ => unreachable!("inode {inode} was looked up as a directory"),
        }
    }

    pub(super) fn replace_file(&mut self, inode: Inode, file: FileData) {
        self.nodes.insert(inode, Rc::new(Node::File(file)));
    }

    /// What a path stands for.
    pub(super) fn lookup(&self, path: &str) -> Result<Inode> {
        let mut inode = ROOT;
        for name in components(path) {
            let dir = self.dir(inode).ok_or_else(|| failed(path, "lookup", ENOTDIR, "Not a directory"))?;
            inode = dir.get(name).ok_or_else(|| not_found(path))?;
        }
        Ok(inode)
    }

    /// The file that a path stands for.
    pub(super) fn lookup_file(&self, path: &str) -> Result<Inode> {
        let inode = self.lookup(path)?;
        match self.dir(inode) {
            None => Ok(inode),
            Some(_) => Err(failed(path, "open", EISDIR, "Is a directory")),
        }
    }

    /// The directory that a path stands for.
    pub(super) fn lookup_dir(&self, path: &str) -> Result<Inode> {
        let inode = self.lookup(path)?;
        match self.dir(inode) {
            Some(_) => Ok(inode),
            None => Err(failed(path, "lookup", ENOTDIR, "Not a directory")),
        }
    }

    /// Makes an empty file or directory that must not exist.
    pub(super) fn make(&mut self, path: &str, node: Node) -> Result<Inode> {
        let (dir, name) = self.vacant(path)?;
        let inode = self.next_inode;
        self.next_inode += 1;
        self.nodes.insert(inode, Rc::new(node));
        let seq = self.next_seq();
        self.dir_mut(dir).change(seq, vec![(name, Some(inode))]);
        Ok(inode)
    }

    /// Names in a directory, sorted.
    pub(super) fn list(&self, path: &str) -> Result<Vec<String>> {
        let inode = self.lookup_dir(path)?;
        Ok(self.dir(inode).into_iter().flat_map(|dir| dir.names().keys().cloned()).collect())
    }

    pub(super) fn stat(&self, inode: Inode) -> Stat {
        let (size_bytes, allocated_blocks, is_dir) = match self.nodes.get(&inode).map(Rc::as_ref) {
            Some(Node::File(file)) => (file.size(), file.allocated_blocks(), false),
            _ => (BLOCK_BYTES as u64, 1, true),
        };
        let allocated_bytes = allocated_blocks * BLOCK_BYTES as u64;
        Stat { size_bytes, allocated_bytes, device: DEVICE, inode, is_dir }
    }

    pub(super) fn unlink(&mut self, path: &str) -> Result<()> {
        self.lookup_file(path)?;
        let (dir, name) = self.parent(path)?;
        let seq = self.next_seq();
        self.dir_mut(dir).change(seq, vec![(name, None)]);
        Ok(())
    }

    pub(super) fn remove_dir(&mut self, path: &str) -> Result<()> {
        let inode = self.lookup_dir(path)?;
        if self.dir(inode).is_some_and(|dir| !dir.names().is_empty()) {
            return Err(failed(path, "rmdir", ENOTEMPTY, "Directory not empty"));
        }
        let (dir, name) = self.parent(path)?;
        let seq = self.next_seq();
        self.dir_mut(dir).change(seq, vec![(name, None)]);
        Ok(())
    }

    pub(super) fn link(&mut self, from: &str, to: &str) -> Result<()> {
        let inode = self.lookup(from)?;
        let (dir, name) = self.vacant(to)?;
        if self.dir(inode).is_some() {
            return Err(failed(from, "link", EPERM, "Operation not permitted"));
        }
        let seq = self.next_seq();
        self.dir_mut(dir).change(seq, vec![(name, Some(inode))]);
        Ok(())
    }

    /// Within a directory one change, across directories two that a power loss may part.
    pub(super) fn rename(&mut self, from: &str, to: &str) -> Result<()> {
        let ((from_dir, from_name), (to_dir, to_name)) = (self.parent(from)?, self.parent(to)?);
        let inode = self.lookup(from)?;
        let replaced = self.dir(to_dir).and_then(|dir| dir.get(&to_name));
        if replaced == Some(inode) {
            return Ok(());
        }
        self.check_replaceable(inode, replaced, from, to)?;
        let seq = self.next_seq();
        if from_dir == to_dir {
            self.dir_mut(from_dir).change(seq, vec![(from_name, None), (to_name, Some(inode))]);
        } else {
            self.dir_mut(to_dir).change(seq, vec![(to_name, Some(inode))]);
            self.dir_mut(from_dir).change(seq, vec![(from_name, None)]);
        }
        Ok(())
    }

    /// The rules of `rename(2)` for what had the new name.
    fn check_replaceable(&self, inode: Inode, replaced: Option<Inode>, from: &str, to: &str) -> Result<()> {
        let is_dir = self.dir(inode).is_some();
        if is_dir && lies_within(to, from) {
            return Err(failed(to, "rename", EINVAL, "Invalid argument"));
        }
        let Some(replaced) = replaced else { return Ok(()) };
        match self.dir(replaced) {
            None if is_dir => Err(failed(to, "rename", ENOTDIR, "Not a directory")),
            Some(_) if !is_dir => Err(failed(to, "rename", EISDIR, "Is a directory")),
            Some(dir) if !dir.names().is_empty() => {
                Err(failed(to, "rename", ENOTEMPTY, "Directory not empty"))
            }
            _ => Ok(()),
        }
    }

    /// Refuses what would not fit: `blocks` more than are taken.
    pub(super) fn check_space(&self, path: &str, blocks: u64) -> Result<()> {
        let needed = blocks * BLOCK_BYTES as u64;
        if blocks > 0 && needed > self.free_bytes() {
            return Err(StorageError::NoSpace { path: path.to_owned() });
        }
        Ok(())
    }

    /// Bytes that the disk would still take.
    pub(super) fn free_bytes(&self) -> u64 {
        let files = self.nodes.values().filter_map(|node| match node.as_ref() {
            Node::File(file) => Some(file.allocated_blocks()),
            Node::Dir(_) => None,
        });
        let used = files.sum::<u64>() * BLOCK_BYTES as u64;
        self.capacity_bytes.unwrap_or(UNLIMITED_BYTES).saturating_sub(used)
    }

    /// Forgets files that no name stands for, or may stand for again after a power loss, and that `open` does not
    /// keep.
    pub(super) fn forget_unreachable(&mut self, open: impl Iterator<Item = Inode>) {
        let mut reached: BTreeSet<Inode> = BTreeSet::from([ROOT]);
        let mut next: Vec<Inode> = open.chain([ROOT]).collect();
        while let Some(inode) = next.pop() {
            reached.insert(inode);
            let inside = self.dir(inode).into_iter().flat_map(DirData::mentioned);
            next.extend(inside.filter(|inode| !reached.contains(inode)));
        }
        self.nodes.retain(|inode, _| reached.contains(inode));
    }

    pub(super) fn digest(&self) -> u64 {
        let mut digest = Digest::new();
        for (inode, node) in &self.nodes {
            digest.number(*inode);
            match node.as_ref() {
                Node::File(file) => file.digest(&mut digest),
                Node::Dir(dir) => dir.digest(&mut digest),
            }
        }
        digest.finish()
    }

    pub(super) fn dir(&self, inode: Inode) -> Option<&DirData> {
        match self.nodes.get(&inode).map(Rc::as_ref) {
            Some(Node::Dir(dir)) => Some(dir),
            _ => None,
        }
    }

    /// The directory of a path and the last name in it.
    fn parent(&self, path: &str) -> Result<(Inode, String)> {
        let trimmed = path.trim_end_matches('/');
        let (dir, name) = trimmed.rsplit_once('/').unwrap_or(("", trimmed));
        let inode = self.lookup_dir(dir).map_err(|error| match error {
            StorageError::NotFound { .. } => not_found(path),
            other => other,
        })?;
        Ok((inode, name.to_owned()))
    }

    /// As [`Self::parent`], of a name that must not exist.
    fn vacant(&self, path: &str) -> Result<(Inode, String)> {
        let (dir, name) = self.parent(path)?;
        let taken = name.is_empty() || self.dir(dir).is_some_and(|dir| dir.get(&name).is_some());
        if taken { Err(StorageError::Exists { path: path.to_owned() }) } else { Ok((dir, name)) }
    }
}

fn components(path: &str) -> impl Iterator<Item = &str> {
    path.split('/').filter(|name| !name.is_empty() && *name != ".")
}

fn lies_within(path: &str, dir: &str) -> bool {
    let mut names = components(path);
    components(dir).all(|name| names.next() == Some(name))
}

fn not_found(path: &str) -> StorageError {
    StorageError::NotFound { path: path.to_owned() }
}

pub(super) fn failed(path: &str, what: &'static str, errno: i32, reason: &str) -> StorageError {
    StorageError::Io { path: path.to_owned(), what, errno, reason: reason.to_owned() }
}
