//! `csnap volume create --from FILE`: a raw image becomes a volume, whole or not at all.
//!
//! The volume is hidden until everything is written and flushed. If this process dies, its agent notices and declares
//! it dead, and the server takes the hidden volume away.

use std::io::{IsTerminal, Read};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail};
use bytes::{Bytes, BytesMut};
use csnap_client::{ClientConfig, ServerSource, Volume};
use csnap_proto::message::local::ToAgent;
use csnap_proto::message::operate::{OperatorReply, OperatorRequest, Source, VolumeInfo};
use csnap_proto::{ChunkSize, Name, Target};
use csnap_server::term::PoolToml;
use indicatif::{ProgressBar, ProgressStyle};
use rustix::fs::Advice;
use tokio::sync::mpsc;

use super::not_yet;
use crate::args::VolumeCreate;
use crate::operator::{Session, unexpected};
use crate::{agents, pool};

/// Bytes read and written at once: large enough for any disk, small enough that progress moves.
const PIECE_BYTES: usize = 1 << 20;

/// Pieces read ahead of the writing.
const AHEAD_MAX: usize = 4;

pub(crate) async fn run(dir: &Path, create: &VolumeCreate, file: &Path) -> anyhow::Result<VolumeInfo> {
    let source = match open_image(file) {
        Err(error) if is_missing(&error) && names_snapshot(file) => {
            return not_yet("volume create --from a snapshot");
        }
        opened => opened.with_context(|| file.display().to_string())?,
    };
    let length = length_of(&source, file)?;
    let size_bytes = create.size.unwrap_or(length);
    if size_bytes < length {
        bail!("{} has {length} bytes and --size is {size_bytes}; give at least as much", file.display());
    }
    let mut session = Session::open(dir).await?;
    // Before anything exists that our death would leave behind.
    agents::wish(&session.agent, ToAgent::WriterHello { instance: session.instance }).await?;
    let name = create.name.clone();
    let pool = pool::path_of(&session.agent).await?;
    let PoolToml { shared, chunk_bytes, .. } = pool::open(&pool).await?.toml;
    let default = ChunkSize::from_bytes(chunk_bytes).context("an open pool has a checked chunk size")?;
    let chunk = create.chunk.unwrap_or(default);
    let request =
        OperatorRequest::VolumeCreate { name: name.clone(), size_bytes, chunk, source: Source::Import };
    session.request(request).await?;
    if shared {
        // The image may lie on the pool's file system, and be newer there than in this host's page cache.
        rustix::fs::fadvise(&source, 0, None, Advice::DontNeed)?;
    }
    let servers = ServerSource::Agents(vec![session.agent.clone()]);
    let config = ClientConfig::new(servers, pool, session.node.clone(), session.instance);
    let filled = fill(ClientConfig { shared, ..config }, name.clone(), source, length).await;
    if let Err(error) = filled {
        session.close().await;
        return Err(error.context(format!("volume {name} was not made")));
    }
    session.done(OperatorRequest::VolumePublish { name: name.clone() }).await?;
    let reply = session.request(OperatorRequest::VolumeShow { name }).await?;
    session.close().await;
    match reply {
        OperatorReply::Volume(volume) => Ok(volume),
        other => Err(unexpected(&other)),
    }
}

/// Opens what bytes can be read from a second time. A FIFO would wait for its other end, a terminal for somebody.
fn open_image(path: &Path) -> anyhow::Result<std::fs::File> {
    let kind = std::fs::metadata(path)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        bail!("it is neither a regular file nor a block device; give a raw image");
    }
    Ok(std::fs::File::open(path)?)
}

fn is_missing(error: &anyhow::Error) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == std::io::ErrorKind::NotFound)
}

/// Whether it reads as `VOLUME@SNAPSHOT`. A file of such a name is a file all the same.
fn names_snapshot(path: &Path) -> bool {
    path.to_str().and_then(|text| text.parse::<Target>().ok()).is_some_and(|target| target.snapshot.is_some())
}

/// Bytes of a file or block device.
fn length_of(mut file: &std::fs::File, path: &Path) -> anyhow::Result<u64> {
    use std::io::{Seek, SeekFrom};
    let length = file.seek(SeekFrom::End(0)).with_context(|| path.display().to_string())?;
    file.seek(SeekFrom::Start(0)).with_context(|| path.display().to_string())?;
    if length == 0 {
        bail!("{} is empty; a volume needs a size", path.display());
    }
    Ok(length)
}

async fn fill(config: ClientConfig, volume: Name, source: std::fs::File, length: u64) -> anyhow::Result<()> {
    let target = Target { volume, snapshot: None };
    let volume = Volume::open(config, target).await?;
    let copied = copy(&volume, source, length).await;
    let released = volume.release().await;
    copied.and(released.map_err(Into::into))
}

async fn copy(volume: &Arc<Volume>, source: std::fs::File, length: u64) -> anyhow::Result<()> {
    let progress = progress(length);
    let (pieces, mut queue) = mpsc::channel(AHEAD_MAX);
    let reader = tokio::task::spawn_blocking(move || read_pieces(source, &pieces));
    let mut offset = 0;
    while let Some(piece) = queue.recv().await {
        let bytes = piece.len() as u64;
        // The head is new and reads as zeros already.
        if piece.iter().any(|byte| *byte != 0) {
            volume.write(offset, piece, false).await?;
        }
        offset += bytes;
        progress.set_position(offset);
    }
    reader.await?.context("reading the image")?;
    if offset != length {
        bail!("the image changed its size while it was read: {offset} of {length} bytes");
    }
    volume.flush().await?;
    progress.finish_and_clear();
    Ok(())
}

fn read_pieces(mut source: std::fs::File, pieces: &mpsc::Sender<Bytes>) -> std::io::Result<()> {
    loop {
        let mut piece = BytesMut::zeroed(PIECE_BYTES);
        let mut filled = 0;
        while filled < piece.len() {
            match source.read(&mut piece[filled..])? {
                0 => break,
                bytes => filled += bytes,
            }
        }
        piece.truncate(filled);
        // Nobody takes it any more: the writing failed, and says so itself.
        if filled == 0 || pieces.blocking_send(piece.freeze()).is_err() {
            return Ok(());
        }
    }
}

/// On a terminal only.
fn progress(length: u64) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}");
    ProgressBar::new(length).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_a_file_or_a_block_device_and_nothing_that_waits() {
        use rustix::fs::{CWD, FileType, Mode, mknodat};

        let directory = tempfile::tempdir().expect("a directory");
        let at = |name: &str| directory.path().join(name);
        mknodat(CWD, at("fifo"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).expect("a FIFO");
        let _socket = std::os::unix::net::UnixListener::bind(at("socket")).expect("a socket");
        for path in [at("fifo"), at("socket"), directory.path().to_owned(), "/dev/zero".into()] {
            let refused = open_image(&path).expect_err("refused").to_string();
            assert!(refused.contains("neither a regular file"), "{path:?}: {refused}");
        }
        std::fs::write(at("image"), b"x").expect("a file");
        assert!(open_image(&at("image")).is_ok());
    }

    #[test]
    fn a_snapshot_is_told_from_a_file_that_is_not_there() {
        let is_snapshot = |text: &str| {
            let refused = open_image(Path::new(text)).expect_err("no such file");
            is_missing(&refused) && names_snapshot(Path::new(text))
        };
        assert!(is_snapshot("v@a"));
        assert!(
            !is_snapshot("v") && !is_snapshot("/no/such/v@a") && !is_snapshot("v@") && !is_snapshot("/tmp")
        );
    }
}
