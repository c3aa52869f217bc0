//! `csnap check`: the offline verifier.

use std::path::Path;

use anyhow::{Context, bail};
use csnap_server::check::{CheckReport, Finding, check};
use serde_json::{Value, json};

use crate::{output, pool, size};

/// Findings that are shown; a damaged pool can have millions.
const SHOWN_MAX: usize = 100;

/// Verifies; a damaged pool is a failure.
pub(crate) async fn run(path: &Path, json: bool, repair: bool) -> anyhow::Result<()> {
    if !path.is_dir() {
        bail!("{} is not a directory; --pool names the directory of a pool", path.display());
    }
    let storage = pool::open(path).await?.storage;
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
        damaged => {
            let places = counted(damaged as u64, "place");
            bail!("pool {} is damaged in {places}; restore it from a copy", path.display())
        }
    }
}

/// As people say it: 1 term, 2 terms.
fn counted(count: u64, noun: &str) -> String {
    if count == 1 { format!("1 {noun}") } else { format!("{count} {noun}s") }
}

fn as_text(report: &CheckReport) -> String {
    let mut text = format!(
        "{}, {}, {}, {}, {} used by snapshots\n",
        counted(report.terms as u64, "term"),
        counted(report.records, "record"),
        counted(report.volumes as u64, "volume"),
        counted(report.snapshots as u64, "snapshot"),
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
        text.push_str(&format!("{} removed\n", counted(report.removed as u64, "leftover")));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_a_kind_is_told_as_one() {
        let one =
            CheckReport { terms: 1, records: 1, volumes: 1, snapshots: 1, removed: 1, ..Default::default() };
        assert_eq!(
            as_text(&one),
            "1 term, 1 record, 1 volume, 1 snapshot, 0 used by snapshots\n1 leftover removed\n"
        );
        let none = CheckReport::default();
        assert_eq!(as_text(&none), "0 terms, 0 records, 0 volumes, 0 snapshots, 0 used by snapshots\n");
    }
}
