//! The life of one server process: stand by, take over, serve, checkpoint, until somebody ends it.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;

use csnap_proto::{Term, Time};
use csnap_server::term::canary::Canaries;
use csnap_server::term::{Fatal, Follower, Journal, Pool, TermError, open_pool, take_over};
use csnap_storage::Storage;

use crate::ledger::{Ledger, Log, batch};

/// What this process will do.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// Looks at the journal before it takes over.
    pub(crate) follows: u64,
    /// Length of each batch that it writes, bytes.
    pub(crate) batches: Vec<usize>,
    /// Begin a checkpoint when so many batches are written.
    pub(crate) checkpoints: Vec<usize>,
}

/// What processes share: the ledger, and lockd's counter of terms.
#[derive(Clone, Default)]
pub(crate) struct Shared {
    pub(crate) ledger: Rc<RefCell<Ledger>>,
    pub(crate) terms: Rc<Cell<u64>>,
    pub(crate) canaries: Canaries,
    /// The medium may fail.
    pub(crate) faults: bool,
}

impl Shared {
    fn next_term(&self) -> Term {
        self.terms.set(self.terms.get() + 1);
        Term(self.terms.get())
    }

    fn violate(&self, what: String) {
        self.ledger.borrow_mut().violate(what);
    }
}

/// Opens the pool as every process does.
pub(crate) async fn open<S: Storage>(storage: &S, canaries: &Canaries) -> Pool<S> {
    let mut pool = open_pool(storage).await.expect("the pool was made before anybody started");
    pool.canaries = canaries.clone();
    pool
}

pub(crate) async fn live<S: Storage>(storage: S, shared: Shared, plan: Plan) {
    let Ok(mut pool) = open_pool(&storage).await else { return };
    pool.canaries = shared.canaries.clone();
    let mut follower = Follower::new(&pool, Log::default());
    for _ in 0..plan.follows {
        match follower.advance().await {
            Ok(_) => shared.ledger.borrow_mut().reach("journal followed"),
            Err(TermError::Storage(_)) if shared.faults => return,
            Err(error) => return shared.violate(format!("a follower found {error}")),
        }
    }
    if follower.loads() > 1 {
        shared.ledger.borrow_mut().reach("follower loaded anew");
    }
    let term = shared.next_term();
    match take_over(&pool, term, follower, || Time(0)).await {
        Ok(taken) => {
            shared.ledger.borrow_mut().serve(term, &taken.replay.ids);
            serve(&taken.journal, taken.replay, &shared, &plan).await;
        }
        Err(TermError::Deposed(_)) => shared.ledger.borrow_mut().reach("taker deposed"),
        Err(TermError::Storage(_)) if shared.faults => shared.ledger.borrow_mut().reach("taker failed"),
        Err(error) => shared.violate(format!("term {term} found {error}")),
    }
}

async fn serve<S: Storage>(journal: &Journal<S>, log: Log, shared: &Shared, plan: &Plan) {
    let log = RefCell::new(log);
    let background = async {
        loop {
            if journal.prepare_segment().await.is_err() || journal.set_aside().await.is_err() {
                return;
            }
            journal.segment_taken().await;
        }
    };
    let foreground = async {
        for (index, bytes) in plan.batches.iter().enumerate() {
            let commit = commit(journal, &log, shared, index as u64, *bytes);
            let ended = if plan.checkpoints.contains(&index) {
                both(commit, checkpoint(journal, &log, shared)).await
            } else {
                commit.await
            };
            if ended.is_err() {
                return;
            }
        }
    };
    until(foreground, background).await;
}

async fn commit<S: Storage>(
    journal: &Journal<S>,
    log: &RefCell<Log>,
    shared: &Shared,
    index: u64,
    bytes: usize,
) -> Result<(), Fatal> {
    let (term, id) = (journal.term(), journal.term().0 << 32 | index);
    let open = journal.commit(batch(id, bytes)).await?;
    if !open {
        shared.ledger.borrow_mut().reach("answer withheld: gate closed");
        return Err(Fatal::Deposed(term));
    }
    log.borrow_mut().ids.push(id);
    shared.ledger.borrow_mut().acknowledge(term, id);
    Ok(())
}

async fn checkpoint<S: Storage>(
    journal: &Journal<S>,
    log: &RefCell<Log>,
    shared: &Shared,
) -> Result<(), Fatal> {
    let (position, state) = (journal.position(), log.borrow().clone());
    let Some(mut writer) = journal.begin_checkpoint(position).await? else { return Ok(()) };
    for piece in state.pieces() {
        writer.piece(&piece).await?;
    }
    writer.finish().await?;
    shared.ledger.borrow_mut().reach("checkpoint done");
    Ok(())
}

/// Runs both to their ends; the first failure ends both.
async fn both<E>(
    a: impl Future<Output = Result<(), E>>,
    b: impl Future<Output = Result<(), E>>,
) -> Result<(), E> {
    let (mut a, mut b) = (pin!(a), pin!(b));
    let (mut a_done, mut b_done) = (false, false);
    poll_fn(|context| {
        if !a_done && let Poll::Ready(ended) = a.as_mut().poll(context) {
            if ended.is_err() {
                return Poll::Ready(ended);
            }
            a_done = true;
        }
        if !b_done && let Poll::Ready(ended) = b.as_mut().poll(context) {
            if ended.is_err() {
                return Poll::Ready(ended);
            }
            b_done = true;
        }
        if a_done && b_done { Poll::Ready(Ok(())) } else { Poll::Pending }
    })
    .await
}

/// Runs `main` to its end, and `beside` as long.
async fn until(main: impl Future<Output = ()>, beside: impl Future<Output = ()>) {
    let (mut main, mut beside) = (pin!(main), pin!(beside));
    let mut beside_done = false;
    poll_fn(|context| {
        beside_done = beside_done || beside.as_mut().poll(context).is_ready();
        main.as_mut().poll(context)
    })
    .await;
}
