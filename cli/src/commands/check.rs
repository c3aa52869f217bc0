//! `csnap check`: the offline verifier.

use std::path::Path;

use anyhow::{Context, bail};
use csnap_server::check::{CheckReport, Finding, check};
use csnap_storage::posix::{PosixOptions, PosixStorage};
use serde_json::{Value, json};

use crate::{output, size};

/// Findings that are shown; a damaged pool can have millions.
const SHOWN_MAX: usize = 100;

/// Verifies; a damaged pool is a failure.
pub(crate) async fn run(path: &Path, json: bool, repair: bool) -> anyhow::Result<()> {
    if !path.is_dir() {
        bail!("{} is not a directory; --pool names the directory of a pool", path.display());
    }
    let storage = PosixStorage::open(path, PosixOptions::default())?;
    // The verifier reads with storage futures of one thread.
    let report = tokio::task::LocalSet::new().run_until(check(&storage, repair)).await;
    let report = report.with_context(|| format!("pool {}", path.display()))?;
    if json {
        output::json(&as_json(&report))?
    } else {
        output::print(&as_text(&report))?
    }
    match report.damage.len() {
        0 => Ok(()),
        damaged => bail!("pool {} is damaged in {damaged} places; restore it from a copy", path.display()),
    }
}

fn as_text(report: &CheckReport) -> String {
    let mut text = format!(
        "{} terms, {} records, {} volumes, {} snapshots, {} used by snapshots\n",
        report.terms,
        report.records,
        report.volumes,
        report.snapshots,
        size::show(report.used_bytes),
    );
    for (kind, findings) in [("damage", &report.damage), ("leftover", &report.leftovers)] {
        for Finding { what, at } in findings.iter().take(SHOWN_MAX) {
            text.push_str(&format!("{kind}: {at}: {what}\n"));
        }
        if findings.len() > SHOWN_MAX {
            text.push_str(&format!("{kind}: {} more\n", findings.len() - SHOWN_MAX));
        }
    }
    if report.removed > 0 {
        text.push_str(&format!("{} leftovers removed\n", report.removed));
    }
    text
}

fn as_json(report: &CheckReport) -> Value {
    let list = |findings: &[Finding]| -> Value {
        findings
            .iter()
            .take(SHOWN_MAX)
            .map(|finding| json!({ "what": finding.what, "at": finding.at }))
            .collect()
    };
    json!({
        "terms": report.terms,
        "records": report.records,
        "volumes": report.volumes,
        "snapshots": report.snapshots,
        "used_bytes": report.used_bytes,
        "damaged": report.damage.len(),
        "damage": list(&report.damage),
        "leftovers": list(&report.leftovers),
        "removed": report.removed,
    })
}
