//! What a process needs from its host: it is asked, because its own configuration says it.

use std::collections::HashMap;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use lotus_runtime::Needs;

use crate::child;
use crate::helper::Helpers;
use crate::processes::Process;
use crate::table::Ended;

/// How long a process may take to say what it needs.
const LIMIT: Duration = Duration::from_secs(20);

/// Why it is not known what a process needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Unknown {
    /// Its configuration or command line is wrong: asking again does not help.
    pub(crate) config: bool,
    pub(crate) why: String,
}

/// What a process said.
pub(crate) type Told = Result<Needs, Unknown>;

/// What is known of one process.
#[derive(Debug, Default)]
pub(crate) enum Asked {
    /// Nothing: it is to be asked before it is started.
    #[default]
    No,
    /// It was asked. `then_spawn` when it is to be started as soon as it has answered.
    Waits { then_spawn: bool },
    /// This is what it needs.
    Told(Needs),
}

/// Asks a process; none if it is one that is not asked.
pub(crate) async fn ask(process: &Process, helpers: &Helpers) -> Option<Told> {
    let command = command(process)?;
    let failed = |config, why| Unknown { config, why };
    let out = match helpers.run(command, LIMIT).await {
        Ok(out) => out,
        Err(e) => {
            return Some(Err(failed(
                false,
                format!("what it needs is not known: {e}"),
            )));
        }
    };
    Some(match out.ended {
        Ended::Clean => serde_json::from_str(&out.stdout)
            .map_err(|e| failed(false, format!("what it says that it needs: {e}"))),
        ended => {
            let said: Vec<&str> = out.stderr.lines().map(str::trim).collect();
            let words = match said.join("; ") {
                said if said.is_empty() => out.words,
                said => said,
            };
            Err(failed(ended == Ended::BadConfig, words))
        }
    })
}

fn command(process: &Process) -> Option<Command> {
    let (program, args) = process.needs.split_first()?;
    let mut command = Command::new(program);
    child::own_variables(&mut command);
    command
        .args(args)
        .env_remove("NOTIFY_SOCKET")
        .envs(&process.env);
    Some(command)
}

/// The processes that can be asked, by name.
#[derive(Clone, Debug)]
pub(crate) struct Asks {
    processes: Arc<HashMap<String, Process>>,
    helpers: Helpers,
}

impl Asks {
    pub(crate) fn new(all: &[Process], helpers: Helpers) -> Self {
        let asked = all.iter().filter(|p| !p.needs.is_empty());
        Self {
            processes: Arc::new(asked.map(|p| (p.name.clone(), p.clone())).collect()),
            helpers,
        }
    }

    /// Asks the process called `name`, if there is one that can be asked.
    pub(crate) async fn ask(&self, name: &str) -> Option<Told> {
        ask(self.processes.get(name)?, &self.helpers).await
    }
}

/// The command that says what `service` needs.
pub(crate) fn of_spoke(markets: &str, service: &str, repo: &Path) -> Vec<String> {
    vec![
        markets.into(),
        "needs".into(),
        format!("--services={service}"),
        "--repo".into(),
        repo.display().to_string(),
        "--json".into(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::helper::tests::reap;

    async fn told(script: &str) -> Told {
        let _alone = crate::child::FORKS.lock().await;
        let helpers = Helpers::default();
        let process = Process {
            needs: ["sh", "-c", script].map(String::from).into(),
            env: [("PORT".to_owned(), "7".to_owned())].into(),
            ..Process::new("x", vec!["x".into()])
        };
        let asks = Asks::new(&[process], helpers.clone());
        assert!(asks.ask("y").await.is_none());
        tokio::select! {
            told = asks.ask("x") => told.unwrap(),
            () = reap(helpers) => panic!("reaping ended"),
        }
    }

    #[tokio::test]
    async fn an_answer_a_wrong_configuration_and_a_failure_are_told_apart() {
        let needs = told(r#"echo "{\"bind\":[$PORT]}""#).await.unwrap();
        assert_eq!(needs.bind, [7], "it has the process's environment");
        let wrong = told("echo 'bad port' >&2; echo ' fix: x' >&2; exit 78")
            .await
            .unwrap_err();
        assert_eq!(
            (wrong.config, wrong.why.as_str()),
            (true, "bad port; fix: x")
        );
        let failed = told("exit 1").await.unwrap_err();
        assert_eq!(
            (failed.config, failed.why.as_str()),
            (false, "exit status 1")
        );
        let odd = told("echo '{'").await.unwrap_err();
        assert!(!odd.config && odd.why.contains("needs"), "{odd:?}");
    }

    #[tokio::test]
    async fn whoever_declares_nothing_is_not_asked() {
        let process = Process::new("x", vec!["x".into()]);
        assert!(ask(&process, &Helpers::default()).await.is_none());
    }
}
