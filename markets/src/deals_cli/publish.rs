//! Deals by proposal on their way to the chain.

use comfy_table::{Table, presets};
use lotus_deals::mk20::Done;
use lotus_deals::operator::Publishing;
use lotus_runtime::Fault;
use reqwest::Method;
use serde_json::json;

use super::Where;
use super::link::{CALL_TIMEOUT, Link};
use super::show::moment;

/// `storage-deals pending-publish`.
#[derive(Debug, clap::Args)]
pub(crate) struct PendingPublish {
    #[command(flatten)]
    at: Where,
    /// Publish those that wait now, without waiting for more.
    #[arg(long)]
    publish_now: bool,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

impl PendingPublish {
    pub(crate) async fn run(self) -> Result<(), Fault> {
        let link = Link::new(&self.at)?;
        let ask = |method| link.request(method, "/publish").timeout(CALL_TIMEOUT);
        let found: Publishing = link.send(ask(Method::GET)).await?;
        if self.publish_now && !found.waiting.is_empty() {
            let _done: Done = link.send(ask(Method::POST)).await?;
        }
        if self.json {
            println!("{}", json!(found));
            return Ok(());
        }
        if found.batches.is_empty() && found.waiting.is_empty() {
            println!("no deal waits for being published");
            return Ok(());
        }
        println!("{}", table(&found));
        match found.due_unix_ms {
            Some(_) if self.publish_now => println!("those that wait are published now"),
            Some(due) => println!(
                "those that wait are published at {} UTC at the latest; --publish-now does it at once",
                moment(due)
            ),
            None => {}
        }
        Ok(())
    }
}

fn table(found: &Publishing) -> Table {
    let mut table = Table::new();
    table
        .load_preset(presets::NOTHING)
        .set_header(["DEAL", "BATCH", "MESSAGE"]);
    for batch in &found.batches {
        let message = batch.message.as_deref().unwrap_or("not sent yet");
        for deal in &batch.deals {
            table.add_row([deal, &batch.number.to_string(), message]);
        }
    }
    for deal in &found.waiting {
        table.add_row([deal, "waits", "-"]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use lotus_deals::operator::PublishBatch;

    #[test]
    fn every_deal_has_its_row() {
        let found = Publishing {
            batches: vec![PublishBatch {
                number: 7,
                attempt: 0,
                message: Some("bafymessage".into()),
                deals: vec!["t1a/01A".into(), "t1a/01B".into()],
            }],
            waiting: vec!["t1b/01C".into()],
            due_unix_ms: Some(1),
        };
        let text = table(&found).to_string();
        let lines: Vec<Vec<&str>> = text
            .lines()
            .map(|l| l.split_whitespace().collect())
            .collect();
        assert_eq!(lines[1], ["t1a/01A", "7", "bafymessage"]);
        assert_eq!(lines[2], ["t1a/01B", "7", "bafymessage"]);
        assert_eq!(lines[3], ["t1b/01C", "waits", "-"]);
    }
}
