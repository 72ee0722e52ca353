"""Messages over both doors: sending, changing, history, limits, retries, marks."""

from __future__ import annotations

import asyncio
import json
import re
import unicodedata
import uuid
from typing import Any

import httpx
import pytest

from app.db.schemas import FILLED_LINE, FILLED_TEXT, MAX_ID, is_blank
from app.services.chat_log.changes import SendMessage
from app.services.container import Services
from tests.support.people import Json, Person, contents, people
from tests.support.servers import Server
from tests.support.socket_client import SocketClient

# After the Big List of Naughty Strings: what breaks parsers, terminals, SQL, templates and fonts.
NAUGHTY = [
    "undefined",
    "NULL",
    "0",
    "-1E+02",
    "NaN",
    "<script>alert('x')</script>",
    "'; DROP TABLE messages; --",
    "1;SELECT pg_sleep(9)",
    "%s%n%d",
    "{{7*7}} ${7*7} #{7*7}",
    "..\\..\\etc/passwd\r\n",
    "\\",
    "\\u0041 \\x41 \\n",
    "\"';`",
    " leading and trailing ",
    "a\tb\nc\rd\r\ne",
    "\x01\x02\x1b[31mred\x1b[0m\x7f\x80\x9f",
    "Ω≈ç√∫˜µ≤≥÷",
    "田中さんにあげて下さい",
    "Привет, как дела? Ёжик",
    "هُنَاكَ بِٱلْبَيْتِ",
    "\u202eright to left\u202c \u200fمرحبا\u200e",
    "e\u0301 stays decomposed and \u00e9 composed",
    "\u1e9e\u0130\u0131\u017f",
    "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👋🏽 🇩🇪 1️⃣",
    "\U0001f600" * 50,
    "\ufeffbyte order mark\ufffe\uffff",
    "\u2028line\u2029paragraph",
    "zero\u200bwidth",
    "\ue000 private \U0010ffff",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
]


# --- sending, over both doors -----------------------------------------------------------------------------------


async def test_every_text_comes_back_to_the_byte_over_socket_and_rest(shared_server: Server) -> None:
    async with shared_server.client() as client:
        ann, bo = await people(client, 2)
        chat_id = await ann.personal(bo)
        longest = "\U0001f600" * 4096  # 16 KiB of UTF-8, 48 KiB when escaped
        texts = [*NAUGHTY, longest]
        async with await ann.open(shared_server) as sender, await bo.open(shared_server) as reader:
            for number, text in enumerate(texts):
                if number % 2:
                    ack = await sender.say(chat_id, text)
                    assert ack["type"] == "ack", (ack, text)
                else:
                    assert (await ann.say(chat_id, text))["content"] == text
                heard = await reader.wait(type="new_message")
                assert heard["message"]["content"] == text
            edited = await ann.edit((await ann.history(chat_id, limit=1))["items"][0], NAUGHTY[19])
            assert (await reader.wait(type="message_edited"))["message"] == edited
        page = await bo.history(chat_id, limit=100)
        assert contents(page) == [*texts[:-1], NAUGHTY[19]]
        assert not all(unicodedata.is_normalized("NFC", text) for text in texts)  # and it stays so
        events = await bo.resume()
        [reset] = [event for event in events if event["type"] == "reset"]
        assert contents(reset) == contents(page)


@pytest.mark.settings(
    max_message_chars=500, max_attachments=50, socket_max_frame_bytes=12 * 500 + 20 * 50 + 1280, max_body_bytes=8280
)
async def test_the_longest_text_fits_into_the_smallest_frame_and_body_that_the_settings_allow(server: Server) -> None:
    longest = "\U0001f600" * 500
    async with server.client() as client:
        ann, bo = await people(client, 2)
        chat_id = await ann.personal(bo)
        async with await ann.open(server) as socket:
            assert (await socket.say(chat_id, longest))["type"] == "ack"
            frame = {
                "type": "new_message",
                "ref": "\U0001f600" * 64,
                "chat_id": MAX_ID,
                "content": longest,
                "message_type": "image",
                "attachments": [MAX_ID - number for number in range(50)],
                "client_id": str(uuid.uuid4()),
                "reply_to": MAX_ID,
            }
            await socket.send(**frame)
            assert (await socket.wait(type="error"))["code"] == "chat_not_found"
        del frame["type"], frame["ref"], frame["chat_id"]
        body = json.dumps(frame)  # as many clients write it; httpx does not
        headers = {**ann.account.headers, "Content-Type": "application/json"}
        answer = await client.post(f"/api/v1/chats/{chat_id}/messages", content=body, headers=headers)
        assert answer.json()["code"] == "reply_not_found"


async def test_what_is_no_message_is_refused_over_both_doors(shared_server: Server) -> None:
    async with shared_server.client() as client:
        ann, bo = await people(client, 2)
        chat_id = await ann.personal(bo)
        kept = await ann.say(chat_id, "x" * 4096)
        # What: raw JSON of the content, then the code of REST and of the socket.
        cases = {
            "too long": (json.dumps("x" * 4097), "message_too_long", "message_too_long"),
            "too long in code points": (json.dumps("\U0001f600" * 4097), "message_too_long", "message_too_long"),
            "empty": ('""', "invalid_request", "invalid_frame"),
            "blank": (json.dumps(" \t\r\n\u00a0\u3000"), "message_empty", "message_empty"),
            "invisible": (json.dumps("\u200b"), "message_empty", "message_empty"),
            "NUL": (json.dumps("a\x00b"), "invalid_request", "invalid_frame"),
            "a high surrogate alone": (r'"\ud83d"', "invalid_json", "invalid_json"),
            "a low surrogate alone": (r'"a\ude00b"', "invalid_json", "invalid_json"),
            "surrogates the wrong way round": (r'"\ude00\ud83d"', "invalid_json", "invalid_json"),
            "a number": ("1", "invalid_request", "invalid_frame"),
            "null": ("null", "invalid_request", "invalid_frame"),
            "a list": ('["x"]', "invalid_request", "invalid_frame"),
        }
        async with await ann.open(shared_server) as socket:
            for name, (content, over_rest, over_socket) in cases.items():
                body = f'{{"content": {content}}}'.encode()
                url = f"/api/v1/chats/{chat_id}/messages"
                headers = {**ann.account.headers, "Content-Type": "application/json"}
                for method, path in (("POST", url), ("PATCH", f"{url}/{kept['id']}")):
                    answer = await client.request(method, path, content=body, headers=headers)
                    assert (answer.status_code, answer.json()["code"]) == (422, over_rest), name
                for command in ('"new_message"', f'"edit_message", "message_id": {kept["id"]}'):
                    frame = f'{{"type": {command}, "chat_id": {chat_id}, "ref": "r", "content": {content}}}'
                    await socket.connection.send(frame)
                    error = await socket.wait(type="error")
                    assert error["code"] == over_socket, name
                    assert error["ref"] == ("r" if over_socket != "invalid_json" else error["ref"]), name
                    assert error["retryable"] is False
            await socket.barrier()
        assert (await ann.history(chat_id))["items"] == [kept]


async def test_a_client_id_comes_back_in_lower_case_over_all_doors_and_in_one_form_only(server: Server) -> None:
    async with server.client() as client:
        ann, bo = await people(client, 2)
        chat_id = await ann.personal(bo)
        path = f"/chats/{chat_id}/messages"
        async with await ann.open(server) as socket, await bo.open(server) as reader:
            upper = str(uuid.uuid4()).upper()
            ack = await socket.say(chat_id, "x", client_id=upper)
            event = await reader.wait(type="new_message")
            # Refused for its form, by the writer, and at once.
            wrong = await socket.say(chat_id, "x", client_id=upper, unknown=1)
            missing = await socket.say(999_999, "x", client_id=upper)
            empty = await socket.say(chat_id, " ", client_id=upper)
            again = await ann.say(chat_id, "again", client_id=upper)
            told = [ack, event["message"], wrong, missing, empty, again]
            assert [one["client_id"] for one in told] == [upper.lower()] * len(told)
            assert again["id"] == ack["message_id"]
            for form in (
                f"{{{upper}}}",
                f"urn:uuid:{upper}",
                upper.replace("-", ""),
                f"{upper[:-1]}\u0661",
                f"{upper}\n",
            ):
                refused = await socket.say(chat_id, "x", client_id=form)
                assert (refused["code"], refused["client_id"]) == ("invalid_frame", form)
                assert await ann.refused("POST", path, {"content": "x", "client_id": form}) == (422, "invalid_request")
        assert contents(await bo.history(chat_id)) == ["x"]


BLANK = [
    "\u200b",
    "\u200d",
    "\u3164",
    "\u2800",
    "\ufe0f",
    "\u034f",
    "\u115f\u1160",
    "\u0301",
    "\U000e0041",
    " \u2060\t",
]
VISIBLE = [
    "👩‍👩‍👧‍👦",
    "1️⃣",
    "🏴\U000e0067\U000e0062\U000e007f",
    "x\u0301\u0302",
    "नि",
    "ㄱ",
    "\u3164.",
    "\ue000",
    "©\ufe0f",
]


async def test_what_shows_nothing_is_no_message_caption_draft_title_or_name(client: httpx.AsyncClient) -> None:
    ann, bo = await people(client, 2)
    group = await ann.group(bo)
    said = await ann.say(group, "said")
    file = await ann.upload(b"notes", "notes.txt")
    files = {"message_type": "file", "attachments": [file["file_id"]]}
    path = f"/chats/{group}/messages"
    for text in BLANK:
        assert await ann.refused("POST", path, {"content": text}) == (422, "message_empty"), text
        assert await ann.refused("POST", path, {"content": text, **files}) == (422, "message_empty"), text
        assert await ann.refused("PATCH", f"{path}/{said['id']}", {"content": text}) == (422, "message_empty"), text
        await ann.do("PUT", f"/chats/{group}/draft", {"content": "begun"})
        assert (await ann.do("PUT", f"/chats/{group}/draft", {"content": text}))["content"] == ""
        for where in (("POST", "/chats/group"), ("PATCH", f"/chats/{group}")):
            assert await ann.refused(*where, {"title": text}) == (422, "invalid_request"), text
        assert await ann.refused("PATCH", "/users/me", {"display_name": text}) == (422, "invalid_request"), text
    for text in VISIBLE:
        assert (await ann.say(group, text))["content"] == text
        shown = unicodedata.normalize("NFC", text)
        assert (await ann.do("PATCH", f"/chats/{group}", {"title": text}))["title"] == shown
        assert (await ann.do("PATCH", "/users/me", {"display_name": text}))["display_name"] == shown
    for caption in ({}, {"content": "notes"}):
        assert (await ann.send_files(group, "file", file, **caption))["content"] == caption.get("content", "")


def test_the_patterns_of_the_schemas_say_what_is_refused() -> None:
    # Beyond, dialects of patterns differ.
    for character in map(chr, (*range(1, 0xD800), *range(0xE000, 0x10000))):
        filled = re.search(FILLED_TEXT, character) is not None
        assert filled is not is_blank(character), hex(ord(character))
        assert not re.search(FILLED_LINE, character) or filled


async def test_a_message_is_sent_answered_edited_and_deleted(client: httpx.AsyncClient) -> None:
    ann, bo, cy = await people(client, 3)
    group = await ann.group(bo, cy)
    question = await ann.say(group, "soup?")
    assert question == {
        "id": question["id"],
        "chat_id": group,
        "seq": 2,
        "version": 3,
        "sender_id": ann.id,
        "client_id": question["client_id"],
        "message_type": "text",
        "content": "soup?",
        "service": None,
        "attachments": [],
        "reply_to": None,
        "reply_to_seq": None,
        "created_at": question["created_at"],
        "edited_at": None,
        "deleted": False,
        "hidden": False,
    }
    uuid.UUID(question["client_id"])
    answer = await bo.say(group, "yes", reply_to=question["id"])
    assert (answer["reply_to"], answer["reply_to_seq"], answer["seq"]) == (question["id"], 2, 3)
    assert await bo.do("GET", f"/chats/{group}/messages/{question['id']}") == question
    # Editing: one's own, and only while it is there.
    edited = await ann.edit(question, "soup today?")
    assert edited == {**question, "content": "soup today?", "version": 5, "edited_at": edited["edited_at"]}
    assert edited["edited_at"] >= question["created_at"]
    assert (await ann.edit(question, "soup today?")) == edited  # the same text changes nothing
    path = f"/chats/{group}/messages/{question['id']}"
    assert await bo.refused("PATCH", path, {"content": "x"}) == (403, "not_your_message")
    service = (await ann.history(group, limit=1, before=2))["items"][0]
    assert await ann.refused("PATCH", f"/chats/{group}/messages/{service['id']}", {"content": "x"}) == (
        403,
        "not_editable",
    )
    assert await ann.refused("DELETE", f"/chats/{group}/messages/{service['id']}") == (403, "not_deletable")
    # Deleting for all: the sender, and admins of the group.
    assert await bo.refused("DELETE", path) == (403, "not_your_message")
    assert await cy.refused("DELETE", f"/chats/{group}/messages/{answer['id']}") == (403, "not_your_message")
    await ann.delete(answer)  # the owner deletes Bo's
    await ann.delete(question)
    await ann.delete(question)  # twice is once
    left = (await cy.history(group, after=1))["items"]
    assert [(one["content"], one["deleted"], one["seq"]) for one in left] == [("", True, 2), ("", True, 3)]
    assert [one["client_id"] for one in left] == [question["client_id"], answer["client_id"]]
    assert (await cy.chat(group))["version"] == 7
    assert await ann.refused("PATCH", path, {"content": "back"}) == (409, "message_deleted")
    for missing in (999_999, question["id"] + 1000):
        assert await ann.refused("DELETE", f"/chats/{group}/messages/{missing}") == (404, "message_not_found")
    assert await ann.refused("POST", f"/chats/{group}/messages", {"content": "x", "reply_to": 999_999}) == (
        404,
        "reply_not_found",
    )


async def test_deleting_for_oneself_hides_a_message_from_nobody_else(shared_server: Server) -> None:
    async with shared_server.client() as client:
        ann, bo = await people(client, 2)
        chat_id = await ann.personal(bo)
        message = await ann.say(chat_id, "a surprise")
        async with (
            await bo.open(shared_server) as phone,
            await bo.open(shared_server) as laptop,
            await ann.open(shared_server) as other,
        ):
            before = (await bo.do("GET", "/users/me"))["account_version"]
            await bo.delete(message, for_everyone=False)
            for socket in (phone, laptop):
                event = await socket.wait(type="message_hidden")
                assert event == {
                    "type": "message_hidden",
                    "account_version": before + 1,
                    "chat_id": chat_id,
                    "message_id": message["id"],
                    "seq": 1,
                }
            # The second time, over the socket this time, changes nothing.
            await phone.send(
                type="delete_message", chat_id=chat_id, message_id=message["id"], for_everyone=False, ref="again"
            )
            assert (await phone.wait(type="ack"))["ref"] == "again"
            await other.barrier()
            assert not [event for event in other.seen if event["type"] != "hello" and event["type"] != "pong"]
            assert (await bo.do("GET", "/users/me"))["account_version"] == before + 1
        hidden = {**message, "content": "", "hidden": True}
        assert (await bo.history(chat_id))["items"] == [hidden]
        assert await bo.do("GET", f"/chats/{chat_id}/messages/{message['id']}") == hidden
        assert (await bo.chat(chat_id))["last_message"] == hidden
        assert (await bo.chat(chat_id))["unread_count"] == 0
        assert (await ann.history(chat_id))["items"] == [message]
        # An edit takes it to everybody; it stays hidden from who hid it, however they catch up.
        await ann.edit(message, "still a surprise")
        for state in ({}, {"chats": {str(chat_id): 2}}):
            [shown] = [m for event in await bo.resume(**state) for m in event.get("messages", [])]
            assert (shown["content"], shown["hidden"]) == ("", True)
        events = await bo.resume(account_version=before, chats={str(chat_id): 2})
        [event] = [one for one in events if one["type"] == "message_hidden"]
        assert (event["message_id"], event["account_version"]) == (message["id"], before + 1)


# --- history ----------------------------------------------------------------------------------------------------


async def test_history_goes_both_ways_and_knows_both_ends(client: httpx.AsyncClient, services: Services) -> None:
    ann, bo = await people(client, 2)
    chat_id = await ann.personal(bo)
    params: Json
    for params in ({}, {"before": 5}, {"after": 5}, {"around": 5}):
        nothing = {"items": [], "version": 1, "has_before": False, "has_after": False}
        assert await ann.history(chat_id, **params) == nothing, params
    changes = [SendMessage(chat_id, ann.id, uuid.uuid4().bytes, str(number)) for number in range(1, 121)]
    await asyncio.gather(*(services.writer.write(change) for change in changes))

    async def page(**params: Any) -> tuple[list[int], bool, bool]:
        answer = await bo.history(chat_id, **params)
        assert [message["content"] for message in answer["items"]] == [str(m["seq"]) for m in answer["items"]]
        assert answer["version"] == 121
        return [message["seq"] for message in answer["items"]], answer["has_before"], answer["has_after"]

    def span(first: int, last: int) -> list[int]:
        return list(range(first, last + 1))

    assert await page() == (span(71, 120), True, False)
    assert await page(limit=100) == (span(21, 120), True, False)
    assert await page(limit=1) == ([120], True, False)
    assert await page(before=71, limit=50) == (span(21, 70), True, True)
    assert await page(before=21, limit=50) == (span(1, 20), False, True)
    assert await page(before=11, limit=10) == (span(1, 10), False, True)
    assert await page(before=12, limit=10) == (span(2, 11), True, True)
    assert await page(before=1) == ([], False, True)
    assert await page(before=121, limit=5) == (span(116, 120), True, False)
    assert await page(before=2**53 - 1, limit=5) == (span(116, 120), True, False)
    assert await page(after=0, limit=10) == (span(1, 10), False, True)
    assert await page(after=10, limit=10) == (span(11, 20), True, True)
    assert await page(after=110, limit=10) == (span(111, 120), True, False)
    assert await page(after=109, limit=10) == (span(110, 119), True, True)
    assert await page(after=120) == ([], True, False)
    assert await page(after=2**53 - 1) == ([], True, False)
    assert await page(around=60, limit=10) == (span(56, 65), True, True)
    assert await page(around=1, limit=10) == (span(1, 10), False, True)
    assert await page(around=120, limit=10) == (span(116, 120), True, False)
    assert await page(around=60, limit=1) == ([60], True, True)
    assert await page(around=0, limit=4) == (span(1, 4), False, True)
    # Walking from either end meets everything once.
    walked: list[int] = []
    edge = 2**53 - 1
    while True:
        items, more, _ = await page(before=edge, limit=7)
        walked = items + walked
        if not more:
            break
        edge = items[0]
    assert walked == span(1, 120)
    walked, edge, more = [], 0, True
    while more:
        items, _, more = await page(after=edge, limit=7)
        walked, edge = walked + items, items[-1]
    assert walked == span(1, 120)
    wrong: list[Json] = [{"limit": 0}, {"limit": 101}, {"before": -1}, {"after": "x"}, {"around": 2**53}]
    for params in wrong:
        assert await bo.refused("GET", f"/messages/history/{chat_id}", **params) == (422, "invalid_request"), params


# --- retries ----------------------------------------------------------------------------------------------------


async def test_fifty_sends_of_one_client_id_at_once_over_all_doors_are_one_message(shared_server: Server) -> None:
    async with shared_server.client() as client:
        ann, bo = await people(client, 2)
        chat_id = await ann.personal(bo)
        client_id = str(uuid.uuid4())
        async with (
            await ann.open(shared_server) as phone,
            await ann.open(shared_server) as laptop,
            await bo.open(shared_server) as reader,
        ):

            async def over_rest() -> tuple[int, int]:
                message = await ann.say(chat_id, "once", client_id=client_id)
                return message["id"], message["seq"]

            async def over(socket: SocketClient) -> tuple[int, int]:
                ack = await socket.say(chat_id, "once", client_id=client_id)
                assert (ack["type"], ack["client_id"], ack["chat_id"]) == ("ack", client_id, chat_id)
                return ack["message_id"], ack["seq"]

            tasks = [over_rest() for _ in range(20)]
            tasks += [over(socket) for socket in (phone, laptop) for _ in range(15)]
            answers = await asyncio.gather(*tasks)
            assert len(set(answers)) == 1
            # Upper-case or in braces it is the same UUID.
            assert (await ann.say(chat_id, "x", client_id=client_id.upper()))["id"] == answers[0][0]
            for socket in (phone, laptop, reader):
                await socket.barrier()
                heard = [event for event in socket.seen if event["type"] == "new_message"]
                assert [event["message"]["id"] for event in heard] == [answers[0][0]]
        assert contents(await bo.history(chat_id)) == ["once"]
        assert (await bo.chat(chat_id))["last_seq"] == 1


async def test_a_late_retry_gets_the_first_answer_whatever_has_happened_since(client: httpx.AsyncClient) -> None:
    ann, bo = await people(client, 2)
    group, personal = await ann.group(bo), await bo.personal(ann)
    client_id = str(uuid.uuid4())
    first = await bo.say(group, "first", client_id=client_id)

    async def retry(**fields: Any) -> Json:
        return await bo.say(group, "something else", client_id=client_id, **fields)

    async def expect(**changed: Any) -> None:
        assert await retry() == {**first, **changed}
        assert await retry(reply_to=999_999) == {**first, **changed}
        count = (await ann.chat(group))["last_seq"]
        await retry()
        assert (await ann.chat(group))["last_seq"] == count

    await expect()
    edited = await bo.edit(first, "edited")
    await expect(content="edited", version=edited["version"], edited_at=edited["edited_at"])
    await ann.delete(first)
    gone = await bo.do("GET", f"/chats/{group}/messages/{first['id']}")
    await expect(content="", deleted=True, version=gone["version"], edited_at=edited["edited_at"])
    # Of another chat, and of another person, it names another message.
    elsewhere = await bo.say(personal, "elsewhere", client_id=client_id)
    hers = await ann.say(group, "hers", client_id=client_id)
    assert len({first["id"], elsewhere["id"], hers["id"]}) == 3
    assert (elsewhere["content"], hers["content"]) == ("elsewhere", "hers")
    # After a removal, and behind a block.
    await ann.remove(group, bo)
    await expect(content="", deleted=True, version=gone["version"], edited_at=edited["edited_at"])
    assert await bo.refused("POST", f"/chats/{group}/messages", {"content": "new"}) == (404, "chat_not_found")
    await ann.block(bo)
    assert (await bo.say(personal, "again", client_id=client_id)) == elsewhere
    assert await bo.refused("POST", f"/chats/{personal}/messages", {"content": "new"}) == (403, "peer_unavailable")


async def test_seqs_are_dense_and_ids_unique_when_many_send_at_once(client: httpx.AsyncClient) -> None:
    crowd = await people(client, 5)
    group = await crowd[0].group(*crowd[1:])
    personal = await crowd[0].personal(crowd[1])

    async def say(person: Person, chat_id: int, text: str) -> Json:
        return await person.say(chat_id, text)

    sent = await asyncio.gather(
        *(say(person, group, f"{person.id}.{i}") for i in range(12) for person in crowd),
        *(say(person, personal, f"{person.id}.{i}") for i in range(12) for person in crowd[:2]),
    )
    assert len({message["id"] for message in sent}) == len(sent)
    for chat_id, count in ((group, 61), (personal, 24)):
        items = (await crowd[1].history(chat_id, limit=100))["items"]
        assert [message["seq"] for message in items] == list(range(1, count + 1))
        assert [message["version"] for message in items] == list(range(2, count + 2))
        told = {message["id"]: message["seq"] for message in sent if message["chat_id"] == chat_id}
        assert told == {message["id"]: message["seq"] for message in items if message["message_type"] == "text"}
        chat = await crowd[0].chat(chat_id)
        assert (chat["last_seq"], chat["version"]) == (count, count + 1)


# --- marks ------------------------------------------------------------------------------------------------------


async def test_marking_a_message_read_reads_all_before_it_and_never_goes_back(client: httpx.AsyncClient) -> None:
    ann, bo, cy, eve = await people(client, 4)
    group = await ann.group(bo, cy)
    sent = [await ann.say(group, str(number)) for number in range(1, 51)]  # seqs 2 to 51
    message42 = sent[41]
    assert (await bo.chat(group))["unread_count"] == 51
    await bo.read(message42)
    chat = await bo.chat(group)
    assert (chat["read_seq"], chat["unread_count"]) == (43, 8)
    assert await ann.readers(sent[0]) == ({bo.id}, {bo.id})
    assert await ann.readers(message42) == ({bo.id}, {bo.id})
    assert await ann.readers(sent[42]) == (set(), set())
    version = (await ann.chat(group))["version"]
    for earlier in (sent[0], message42):
        await bo.read(earlier)
    assert (await bo.chat(group))["read_seq"] == 43
    assert (await ann.chat(group))["version"] == version  # nothing moved, nothing to tell
    await bo.read(sent[49])
    await cy.say(group, "who sends has read")
    assert (await bo.chat(group))["unread_count"] == 1
    assert await ann.readers(sent[49]) == ({bo.id, cy.id}, {bo.id, cy.id})
    answer = await ann.do("GET", f"/chats/{group}/messages/{sent[49]['id']}/readers")
    assert all(reader["read_at"] >= sent[49]["created_at"] for reader in answer["read_by"])
    # A stranger learns nothing and marks nothing.
    for method, route in (("POST", "read"), ("POST", "delivered"), ("GET", "readers")):
        path = f"/chats/{group}/messages/{message42['id']}/{route}"
        assert await eve.refused(method, path) == (404, "chat_not_found")
        assert await bo.refused(method, f"/chats/{group}/messages/999999/{route}") == (404, "message_not_found")
    assert await ann.readers(message42) == ({bo.id, cy.id}, {bo.id, cy.id})
    # Who left is not asked about any more.
    await cy.leave(group)
    assert await ann.readers(sent[49]) == ({bo.id}, {bo.id})


async def test_who_has_no_socket_marks_what_a_push_brought_as_delivered(client: httpx.AsyncClient) -> None:
    ann, bo = await people(client, 2)
    chat_id = await ann.personal(bo)
    first, second = await ann.say(chat_id, "one"), await ann.say(chat_id, "two")
    for message, reached in ((first, 1), (second, 2), (first, 2)):
        await bo.do("POST", f"/chats/{chat_id}/messages/{message['id']}/delivered")
        chat = await ann.chat(chat_id)
        assert (chat["peer_delivered_seq"], chat["peer_read_seq"]) == (reached, 0)
    assert (await bo.chat(chat_id))["unread_count"] == 2


async def test_what_somebody_hid_is_empty_in_the_answer_to_an_edit_and_to_a_repeated_send(
    client: httpx.AsyncClient,
) -> None:
    ann, bo = await people(client, 2)
    chat_id = await ann.personal(bo)
    client_id = str(uuid.uuid4())
    sent = await ann.say(chat_id, "my own", client_id=client_id)
    assert await ann.say(chat_id, "my own", client_id=client_id) == sent
    await ann.delete(sent, for_everyone=False)
    hidden = {**sent, "content": "", "hidden": True}
    assert await ann.say(chat_id, "my own", client_id=client_id) == hidden
    edited = await ann.edit(sent, "still heard by others")
    assert (edited["content"], edited["hidden"], edited["edited_at"] is None) == ("", True, False)
    assert contents(await bo.history(chat_id)) == ["still heard by others"]


@pytest.mark.settings(limit_messages_per_second=1, limit_messages_burst=3)
async def test_messages_are_limited_by_account_over_both_doors_together(server: Server) -> None:
    async with server.client() as client:
        ann, bo = await people(client, 2)
        chat_id = await ann.personal(bo)
        async with await ann.open(server) as socket:
            message = await ann.say(chat_id, "one")
            await socket.say(chat_id, "two")
            await ann.edit(message, "three")
            refusal = await socket.say(chat_id, "four", client_id="00000000-0000-0000-0000-000000000004")
            assert (refusal["type"], refusal["code"], refusal["retryable"]) == ("error", "rate_limited", True)
            assert refusal["client_id"] == "00000000-0000-0000-0000-000000000004"
            assert 0 < refusal["retry_after"] <= 1
            answer = await ann.request("POST", f"/chats/{chat_id}/messages", {"content": "five"})
            assert (answer.status_code, answer.json()["code"]) == (429, "rate_limited")
            assert answer.headers["retry-after"] == "1"
            hide = {"type": "delete_message", "chat_id": chat_id, "message_id": message["id"], "for_everyone": False}
            await socket.send(**hide, ref="hide")
            assert (await socket.wait(ref="hide"))["code"] == "rate_limited"
            await ann.read(message)  # marks are not messages
        await bo.say(chat_id, "another account")
        assert contents(await bo.history(chat_id)) == ["three", "two", "another account"]


@pytest.mark.settings(limit_messages_per_second=0.001, limit_messages_burst=4)
async def test_deletions_of_both_kinds_and_changes_of_groups_count_as_messages(client: httpx.AsyncClient) -> None:
    bo, cy = await people(client, 2)

    async def allowed(change: str) -> int:
        """How often somebody may do this before they are told to wait."""
        ann, dan = await people(client, 2)
        group = await ann.group(bo, dan, title="before")
        said = [await dan.say(group, str(number)) for number in range(4)]
        lone = [await ann.group() for _ in range(5)] if change == "leave" else [0] * 5
        for number in range(5):
            message = said[number % 4]["id"]
            cy_joins = number % 2 == 0
            requests: dict[str, tuple[str, str, Any]] = {
                "title": ("PATCH", f"/chats/{group}", {"title": f"title {number}"}),
                "both": ("PATCH", f"/chats/{group}", {"title": f"title {number}", "description": f"{number}"}),
                "settings": ("PATCH", f"/chats/{group}", {"history_visible": bool(number % 2)}),
                "role": ("PUT", f"/chats/{group}/members/{bo.id}/role", {"role": ("admin", "member")[number % 2]}),
                "members": ("POST", f"/chats/{group}/members", {"user_ids": [cy.id]})
                if cy_joins
                else ("DELETE", f"/chats/{group}/members/{cy.id}", None),
                "avatar": ("DELETE", f"/chats/{group}/avatar", None),
                "leave": ("POST", f"/chats/{lone[number]}/leave", None),
                "delete": ("DELETE", f"/chats/{group}/messages/{message}", None),
                "hide": ("DELETE", f"/chats/{group}/messages/{message}?for_everyone=false", None),
            }
            version = (await bo.chat(group))["version"]
            answer = await ann.request(*requests[change])
            if not answer.is_success:
                assert (answer.status_code, answer.json()["code"]) == (429, "rate_limited"), change
                assert (await bo.chat(group))["version"] == version
                return number
        return 5

    changes = ("title", "settings", "role", "members", "avatar", "leave", "delete", "hide")
    assert {change: await allowed(change) for change in changes} == dict.fromkeys(changes, 4)
    assert await allowed("both") == 2  # two service messages each
