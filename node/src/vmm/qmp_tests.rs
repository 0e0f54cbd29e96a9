//! The client against peers that are not QEMU: garbage, floods, silence, sudden ends.

use super::*;
use proptest::prelude::*;
use tokio::io::AsyncReadExt;

const SOON: Duration = Duration::from_millis(200);
const GREETING: &[u8] =
    b"{\"QMP\":{\"version\":{\"qemu\":{\"major\":10,\"minor\":0,\"micro\":2},\"package\":\"x\"},\"capabilities\":[\"oob\"]}}\r\n";

/// A peer that greets, accepts the negotiation, and then belongs to the test.
async fn connected() -> (Qmp, UnixStream) {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let peer = tokio::spawn(async move {
        theirs.write_all(GREETING).await.unwrap();
        let request = read_request(&mut theirs).await;
        assert_eq!(request["arguments"]["enable"], json!(["oob"]));
        answer(&mut theirs, &request, json!({})).await;
        theirs
    });
    let qmp = Qmp::over(ours, Duration::from_secs(5)).await.unwrap();
    (qmp, peer.await.unwrap())
}

async fn read_request(peer: &mut UnixStream) -> Value {
    let mut line = Vec::new();
    loop {
        let byte = peer.read_u8().await.unwrap();
        if byte == b'\n' {
            return serde_json::from_slice(&line).unwrap();
        }
        line.push(byte);
    }
}

async fn answer(peer: &mut UnixStream, request: &Value, value: Value) {
    let line = json!({ "return": value, "id": request["id"] }).to_string() + "\r\n";
    peer.write_all(line.as_bytes()).await.unwrap();
}

#[tokio::test]
async fn commands_are_answered_out_of_order_and_by_id() {
    let (qmp, mut peer) = connected().await;
    assert_eq!((qmp.version(), qmp.has_oob()), ([10, 0, 2], true));
    let (a, b) = (qmp.clone(), qmp.clone());
    let first = tokio::spawn(async move { a.execute("one", Value::Null, SOON * 10).await });
    let one = read_request(&mut peer).await;
    let second =
        tokio::spawn(async move { b.execute_oob("two", json!({"x": 1}), SOON * 10).await });
    let two = read_request(&mut peer).await;
    assert_eq!((&one["execute"], &two["exec-oob"]), (&json!("one"), &json!("two")));
    answer(&mut peer, &two, json!(2)).await;
    let refusal = json!({"error": {"class": "GenericError", "desc": "no\nway"}, "id": one["id"]});
    peer.write_all(format!("{refusal}\r\n").as_bytes()).await.unwrap();
    assert_eq!(second.await.unwrap().unwrap(), json!(2));
    let error = first.await.unwrap().unwrap_err();
    assert_eq!(error.to_string(), "QEMU refuses one: no way");
}

#[tokio::test]
async fn silence_ends_at_the_deadline_and_the_client_goes_on() {
    let (qmp, mut peer) = connected().await;
    let late = qmp.execute("slow", Value::Null, SOON).await;
    assert!(matches!(late, Err(QmpError::Deadline { .. })));
    let slow = read_request(&mut peer).await;
    answer(&mut peer, &slow, json!("too late")).await;
    assert!(qmp.0.shared.pending().is_empty());
    let client = qmp.clone();
    let next = tokio::spawn(async move { client.execute("next", Value::Null, SOON * 10).await });
    let request = read_request(&mut peer).await;
    answer(&mut peer, &request, json!("in time")).await;
    assert_eq!(next.await.unwrap().unwrap(), json!("in time"));
}

#[tokio::test]
async fn the_end_fails_everything_in_flight() {
    let (qmp, peer) = connected().await;
    let client = qmp.clone();
    let waiting = tokio::spawn(async move { client.execute("x", Value::Null, SOON * 100).await });
    let mut events = qmp.events();
    drop(peer);
    assert!(matches!(waiting.await.unwrap(), Err(QmpError::Disconnected)));
    assert_eq!(events.next().await, Err(super::super::events::Missed::Closed));
    let later = qmp.execute("y", Value::Null, SOON * 100).await;
    assert!(matches!(later, Err(QmpError::Disconnected)));
    qmp.closed().await;
}

#[tokio::test]
async fn unknown_events_and_garbage_are_passed_over() {
    let (qmp, mut peer) = connected().await;
    let mut events = qmp.events();
    let lines = [
        "{\"event\":\"FROM_THE_FUTURE\",\"data\":[1,2],\"timestamp\":{\"seconds\":7,\"microseconds\":8}}",
        "not json",
        "[]",
        "{\"return\":{},\"id\":424242}",
        "{\"error\":5,\"id\":424243}",
        "{\"event\":5}",
        "{\"event\":\"NO_TIME\",\"timestamp\":{\"seconds\":9223372036854775807,\"microseconds\":1}}",
        "{\"event\":\"STOP\"}",
    ];
    peer.write_all((lines.join("\r\n") + "\r\n").as_bytes()).await.unwrap();
    let first = events.next().await.unwrap();
    assert_eq!((first.name.as_str(), first.at.micros), ("FROM_THE_FUTURE", 7_000_008));
    assert_eq!(events.next().await.unwrap().name, "STOP");
    assert!(!qmp.is_closed());
}

#[tokio::test]
async fn a_line_without_end_closes_the_connection() {
    let (qmp, mut peer) = connected().await;
    let flood = vec![b'x'; 1 << 20];
    for _ in 0..18 {
        if peer.write_all(&flood).await.is_err() {
            break;
        }
    }
    tokio::time::timeout(Duration::from_secs(10), qmp.closed()).await.unwrap();
}

#[tokio::test]
async fn a_peer_that_is_no_qemu_is_refused() {
    for greeting in ["HTTP/1.1 200 OK\r\n", "{}\n", ""] {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(greeting.as_bytes()).await.unwrap();
        drop(theirs);
        assert!(Qmp::over(ours, SOON).await.is_err(), "{greeting}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_bytes_break_the_client(chunks in prop::collection::vec(
        prop_oneof![
            prop::collection::vec(any::<u8>(), 0..200),
            "\\{\"(event|return|error|id|timestamp)\":[^\n]{0,40}\\}?\n".prop_map(String::into_bytes),
        ], 0..40))
    {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (qmp, mut peer) = connected().await;
            for chunk in &chunks {
                if peer.write_all(chunk).await.is_err() {
                    break;
                }
            }
            drop(peer);
            let ended = tokio::time::timeout(Duration::from_secs(5), qmp.closed()).await;
            prop_assert!(ended.is_ok());
            let answer = qmp.execute("x", Value::Null, SOON).await;
            prop_assert!(matches!(answer, Err(QmpError::Disconnected)));
            Ok(())
        })?;
    }
}
