//! The past cannot write (law 2): a server is frozen at any of its operations, with what it asked of the disk not done
//! yet; another one takes over and answers; then the first one goes on.

use std::cell::RefCell;
use std::rc::Rc;

use csnap_proto::Term;
use csnap_storage::sim::executor::{Task, run};
use csnap_storage::sim::{Rng, SimDisk, SimNode};

use crate::explore::new_pool;
use crate::history::{history, live, send_again};
use crate::model::{Change, Ledger};
use crate::server::{Broken, Gone, Server};

const SUCCESSOR: Term = Term(100);

/// Freezes a server, which breaks these rules, after so many operations. `false` if the history is over by then.
pub(crate) fn freeze_after(operations: u64, broken: &Broken) -> Result<bool, String> {
    let rng = &mut Rng::new(operations);
    let disk = new_pool(operations);
    disk.set_stepped(true);
    let ledger = Rc::new(RefCell::new(Ledger::default()));
    let mut frozen = Task::new(live(disk.clone(), ledger.clone(), broken.clone(), history(0)));
    if frozen.run_operations(&disk, operations) {
        return Ok(false);
    }
    let promised = ledger.borrow().clone();
    let successor = succeed(&disk, &promised).map_err(|gone| gone.to_string())?;
    let digest = successor.state().digest();
    while !frozen.poll() && disk.complete_next(rng).is_some() {}
    if let Some(Err(Gone::Failed(why))) = frozen.into_output() {
        return Err(format!("the frozen one, in {}: {why}", promised.doing));
    }
    // What it acknowledged even now was durable before its gate was closed.
    disk.set_stepped(false);
    run(ledger.borrow().found(&disk.storage(SimNode(SUCCESSOR.0)), successor.state()))
        .map_err(|violation| format!("frozen in {}: {violation}", promised.doing))?;
    drop(successor);
    let last = run(Server::begin(&disk.storage(SimNode(0)), SUCCESSOR.next(), &Broken::default()));
    let last = last.map_err(|gone| gone.to_string())?;
    if last.base != digest {
        return Err(format!("frozen in {}: what its successor recorded is not there", promised.doing));
    }
    Ok(true)
}

/// Takes over while the other one does nothing, and answers the operator that asks again.
fn succeed(disk: &SimDisk, promised: &Ledger) -> Result<Server, Gone> {
    let node = SimNode(SUCCESSOR.0);
    let storage = disk.storage(node);
    let mut task = Task::new(async {
        let mut server = Server::begin(&storage, SUCCESSOR, &Broken::default()).await?;
        promised.found(&storage, server.state()).await.map_err(Gone::Failed)?;
        // A snapshot needs the writer, which waits for nobody here.
        if !matches!(promised.in_hand, Some(Change::Snapshot { .. })) {
            send_again(&mut server, promised).await?;
        }
        server.rest().await?;
        Ok(server)
    });
    while !task.poll() {
        let next = disk.pending().into_iter().find(|pending| pending.node == node);
        let next = next.ok_or_else(|| Gone::Failed("the successor waits for the frozen one".to_owned()))?;
        disk.complete(next.id);
    }
    task.into_output().expect("it is over")
}

#[test]
fn a_server_frozen_at_any_operation_changes_nothing_when_it_goes_on() {
    let mut frozen = 0;
    for operations in 0.. {
        match freeze_after(operations, &Broken::default()) {
            Ok(true) => frozen += 1,
            Ok(false) => break,
            Err(violation) => panic!("after {operations} operations: {violation}"),
        }
    }
    println!("frozen at {frozen} operations of one history");
    assert!(frozen > 300, "{frozen}");
}
