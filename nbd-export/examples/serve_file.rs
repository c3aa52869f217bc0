//! Serves one raw file over a unix socket: `serve_file SOCKET FILE [WORKERS]`. For measurements.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use csnap_nbd_export::file::{FileExport, FileExports};
use csnap_nbd_export::shell::{Listener, serve};

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [socket, file, rest @ ..] = &arguments[..] else {
        anyhow::bail!("usage: serve_file SOCKET FILE [WORKERS]");
    };
    let workers = rest.first().map_or(Ok(2), |count| count.parse()).context("WORKERS is a number")?;
    let export = FileExport::open(Path::new(file), false).with_context(|| file.clone())?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers)
        .max_blocking_threads(16)
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let listener = Listener::unix(Path::new(socket)).with_context(|| socket.clone())?;
        println!("{}", listener.uri()?);
        let exports = Arc::new(FileExports::new().with("file", export));
        serve(vec![listener], exports, async {
            // Without a handler the default action of ^C ends the process, which is as good here.
            let _ = tokio::signal::ctrl_c().await;
        })
        .await;
        Ok(())
    })
}
