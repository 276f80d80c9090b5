//! The manager as a process: set-up, enrolment, inventory, bad input. No VRA runs here; `two_vras.rs` has them.

mod common;

use std::process::Command;

use common::{Site, found_in_files, wait_for};
use serde_json::Value;
use vra::api::VraId;
use vra::api::enroll::{EnrollErrorCode, Token};
use vra::pki::EnrollClientError;

fn refused(result: Result<(), EnrollClientError>) -> (EnrollErrorCode, String) {
    match result {
        Err(EnrollClientError::Refused(error)) => (error.code, error.message),
        other => panic!("not refused but {other:?}"),
    }
}

/// As bash itself takes it: it answers what can follow `zvm vpg f`.
#[test]
fn a_shell_completes_arguments() {
    let script = "source <(\"$0\" completion bash); COMP_WORDS=(zvm vpg f); COMP_CWORD=2; \
                  _zvm zvm f vpg; echo \"${COMPREPLY[@]}\"";
    let bash = Command::new("bash").args(["-c", script, env!("CARGO_BIN_EXE_zvm")]).output().expect("bash");
    assert_eq!(String::from_utf8_lossy(&bash.stdout).trim(), "force-sync", "{bash:?}");
}

#[test]
fn a_manager_must_be_initialised_once() {
    let site = Site::without_manager();
    let answer = site.zvm(&["serve"]);
    assert!(answer.code == 1 && answer.stderr.contains("run `zvm init` first"), "{answer:?}");
    let answer = site.zvm(&["status"]);
    assert!(answer.code == 5 && answer.stderr.contains("is `zvm serve` running"), "{answer:?}");
    assert_eq!(site.zvm(&["init"]).code, 0);
    let answer = site.zvm(&["init"]);
    assert!(answer.code == 1 && answer.stderr.contains("initialised already"), "{answer:?}");
}

#[test]
fn one_manager_runs_on_a_state_folder() {
    let site = Site::start();
    let answer = site.zvm(&["serve"]);
    assert!(answer.code == 1 && answer.stderr.contains("another `zvm serve` runs"), "{answer:?}");
}

#[test]
fn a_token_lets_one_vra_in_once() {
    let site = Site::start();
    let token = site.token("vra-a");
    let vra = VraId::random();
    site.enrol("a", &token, vra).expect("enrolment");
    let vras = site.json(&["vra", "list"]);
    assert_eq!(vras[0]["name"], "vra-a", "{vras}");
    assert_eq!(vras[0]["id"], vra.to_string());
    assert_eq!(vras[0]["address"], "127.0.0.1:9");

    let (code, message) = refused(site.enrol("b", &token, VraId::random()));
    assert_eq!(code, EnrollErrorCode::TokenUsed);
    assert!(message.contains(&vra.to_string()), "{message}");

    let unknown = Token { secret: [7; 32], ca_sha256: token.ca_sha256 };
    assert_eq!(refused(site.enrol("b", &unknown, VraId::random())).0, EnrollErrorCode::UnknownToken);

    let secret = vra::api::enroll::hex(&token.secret);
    assert_eq!(found_in_files(&site.dir.join("state"), &secret), None, "only its hash is kept");
    assert!(!site.log().contains(&secret));
    let events = site.json(&["event", "list"]).to_string();
    assert!(events.contains("InstallVra") && events.contains("EnrolmentRefused"), "{events}");
}

#[test]
fn an_ended_token_and_one_of_another_site_are_refused() {
    let site = Site::start();
    let answer = site.zvm(&["vra", "token", "create", "--name", "vra-a", "--ttl", "1s"]);
    let token: Token = answer.stdout.trim().parse().expect("a token");
    std::thread::sleep(std::time::Duration::from_millis(1_200));
    assert_eq!(refused(site.enrol("a", &token, VraId::random())).0, EnrollErrorCode::TokenExpired);
    let foreign = Token { secret: token.secret, ca_sha256: [3; 32] };
    let error = site.enrol("a", &foreign, VraId::random()).expect_err("another CA");
    assert!(matches!(error, EnrollClientError::NotTheTokensZvm { .. }), "{error}");
}

#[test]
fn a_name_belongs_to_one_vra_until_it_is_revoked() {
    let site = Site::start();
    let (old, new) = (VraId::random(), VraId::random());
    site.enrol("old", &site.token("vra-a"), old).expect("enrolment");
    let (code, message) = refused(site.enrol("new", &site.token("vra-a"), new));
    assert_eq!(code, EnrollErrorCode::BadRequest);
    assert!(message.contains("another VRA is enrolled as vra-a"), "{message}");
    let (_, message) = refused(site.enrol("old", &site.token("vra-z"), old));
    assert!(message.contains("enrolled as vra-a"), "{message}");
    // The same VRA again under its name: a new certificate for the old one.
    site.enrol("old", &site.token("vra-a"), old).expect("renewal");

    assert_eq!(site.zvm(&["vra", "revoke", "vra-a"]).code, 0);
    assert_eq!(site.zvm(&["vra", "revoke", &old.to_string()]).code, 4, "revoked already");
    assert_eq!(refused(site.enrol("old", &site.token("vra-a"), old)).0, EnrollErrorCode::Revoked);
    site.enrol("new", &site.token("vra-a"), new).expect("the name is free again");
    let states: Vec<Value> = site
        .json(&["vra", "list"])
        .as_array()
        .expect("list")
        .iter()
        .map(|vra| vra["state"].clone())
        .collect();
    assert_eq!(states, ["enrolled", "revoked"]);
}

#[test]
fn what_is_known_survives_a_kill() {
    let mut site = Site::start();
    site.enrol("a", &site.token("vra-a"), VraId::random()).expect("enrolment");
    let before = site.json(&["event", "list"]);
    site.kill();
    site.serve();
    assert_eq!(site.json(&["vra", "list"])[0]["name"], "vra-a");
    let after = site.json(&["event", "list"]);
    let ids = |events: &Value| -> Vec<String> {
        events.as_array().expect("list").iter().map(|event| event["id"].to_string()).collect()
    };
    assert!(ids(&before).iter().all(|id| ids(&after).contains(id)));
}

#[test]
fn a_bad_inventory_is_an_alert_and_the_last_good_one_stays() {
    let site = Site::start();
    site.write_inventory("[[site]]\nname = \"london\"\n");
    wait_for("the inventory", || site.json(&["inventory"])["inventory"]["sites"][0]["name"] == "london");
    wait_for("no alert", || site.zvm(&["alert", "list"]).stdout.contains("No alerts"));

    site.write_inventory("[[site]]\nname = \"paris\"\n\n[[host]]\nname = \"kvm-a\"\nsite = \"rome\"\n");
    wait_for("the alert", || {
        let alerts = site.zvm(&["alert", "list"]).stdout;
        alerts.contains("inventory.toml, line 6: host.site: there is no [[site]] named \"rome\"")
    });
    assert_eq!(site.json(&["inventory"])["inventory"]["sites"][0]["name"], "london");

    site.write_inventory("[[site]]\nname = \"paris\"\n");
    wait_for("the new inventory", || site.json(&["inventory"])["inventory"]["sites"][0]["name"] == "paris");
    wait_for("the alert's end", || site.zvm(&["alert", "list"]).stdout.contains("No alerts"));
    assert!(site.zvm(&["alert", "list", "--all"]).stdout.contains("over at"));
}

#[test]
fn what_does_not_exist_is_named_with_a_way_out() {
    let site = Site::start();
    let cases: [(&[&str], i32, &str); 13] = [
        (&["vpg", "show", "shop"], 3, "there is no VPG \"shop\""),
        (&["vpg", "delete", "shop"], 3, "zvm vpg list"),
        (&["checkpoint", "list", "shop"], 3, "there is no VPG"),
        (&["test", "start", "shop"], 3, "there is no VPG"),
        (&["vra", "show", "vra-x"], 3, "zvm vra token create"),
        (&["vpg", "create", "shop", "--vm", "db", "--target", "b", "--datastore", "/d"], 3, "no VM \"db\""),
        (
            &["vpg", "create", "a/b", "--vm", "db", "--target", "b", "--datastore", "/d"],
            2,
            "cannot be the name",
        ),
        (&["vpg", "create", "shop", "--vm", "db", "--target", "b"], 2, "--datastore"),
        (&["vpg", "create", "--file", "/dev/zero"], 2, "more than 1048576 bytes"),
        (&["checkpoint", "list", "shop", "--from", "yesterday"], 2, "write one as 2026-11-22T16:00:05Z"),
        (&["task", "show", "x"], 2, "`zvm task list` shows"),
        (&["event", "list", "--limit", "0"], 2, "not in 1..="),
        (&["vra", "set-address", "vra-x", "nonsense"], 3, "there is no VRA"),
    ];
    for (args, code, words) in cases {
        let answer = site.zvm(args);
        assert_eq!(answer.code, code, "{args:?}: {answer:?}");
        assert!(answer.stderr.contains(words), "{args:?}: {answer:?}");
    }
}
