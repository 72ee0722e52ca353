"""Every code that a documented operation answers with, as its problem reads. A test compares it with what is raised."""

from __future__ import annotations

from typing import NamedTuple


class ProblemExample(NamedTuple):
    """What is told with a code; `field` names the part of the body at fault."""

    status: int
    detail: str
    field: str | None = None


PROBLEM_EXAMPLES = {
    "attachment_mismatch": ProblemExample(
        422,
        "Messages of every type but text hold files, each of them once; those of type text hold none.",
        "attachments",
    ),
    "bad_request": ProblemExample(400, "The body cannot be read."),
    "body_too_large": ProblemExample(413, "A body may have 1048576 bytes."),
    "body_too_slow": ProblemExample(408, "The body did not come within 20 seconds."),
    "busy": ProblemExample(503, "Somebody else is changing the same thing; try again."),
    "cannot_block_self": ProblemExample(409, "You cannot block yourself."),
    "chat_not_found": ProblemExample(404, "There is no such chat."),
    "database_unavailable": ProblemExample(503, "The database does not answer; try again."),
    "file_empty": ProblemExample(422, "The file is empty.", "file"),
    "file_in_use": ProblemExample(409, "A message holds this file; delete the message instead."),
    "file_not_found": ProblemExample(404, "There is no such file."),
    "file_too_large": ProblemExample(413, "A file may have 52428800 bytes."),
    "group_full": ProblemExample(409, "A group has at most 2000 members."),
    "image_too_large": ProblemExample(422, "An image has at most 25 million pixels.", "file"),
    "invalid_credentials": ProblemExample(401, "The phone or the password is wrong."),
    "invalid_cursor": ProblemExample(422, "The cursor is not one that the server gave."),
    "invalid_image": ProblemExample(422, "This is not an image that can be read.", "file"),
    "invalid_json": ProblemExample(422, "The body is not valid JSON."),
    "invalid_phone": ProblemExample(
        422, "This is not a phone number with its country code, such as +79991234567.", "phone"
    ),
    "invalid_refresh_token": ProblemExample(401, "The session has ended or expired; log in again."),
    "invalid_request": ProblemExample(422, "The request is not acceptable; see `errors`."),
    "invalid_token": ProblemExample(401, "The token is missing, invalid or expired."),
    "invalid_upload": ProblemExample(422, "The body ended before it was complete.", "file"),
    "message_deleted": ProblemExample(409, "The message has been deleted."),
    "message_empty": ProblemExample(422, "A message needs some text.", "content"),
    "message_not_found": ProblemExample(404, "There is no such message."),
    "message_too_long": ProblemExample(422, "A message has at most 4096 characters.", "content"),
    "not_a_group": ProblemExample(409, "This can be done in groups only."),
    "not_allowed": ProblemExample(403, "Only the admins may do this."),
    "not_deletable": ProblemExample(403, "Service messages cannot be deleted for everybody."),
    "not_editable": ProblemExample(403, "Service messages cannot be edited."),
    "not_ready": ProblemExample(503, "A dependency does not answer."),
    "not_your_message": ProblemExample(403, "Only its sender may edit a message."),
    "overloaded": ProblemExample(503, "Too much is waiting to be written; try again."),
    "owner_must_transfer": ProblemExample(409, "Hand the group over before you leave it."),
    "peer_blocked": ProblemExample(403, "You have blocked this person; unblock them first."),
    "peer_unavailable": ProblemExample(403, "This person cannot be reached."),
    "phone_taken": ProblemExample(409, "There is an account with this phone already.", "phone"),
    "precondition_failed": ProblemExample(412, "The file has none of these ETags."),
    "query_too_short": ProblemExample(422, "Search for at least 3 characters.", "q"),
    "quota_exceeded": ProblemExample(403, "All your files together may have 10737418240 bytes."),
    "range_not_satisfiable": ProblemExample(416, "The range begins behind the end of the file."),
    "rate_limited": ProblemExample(429, "Too many requests; wait a while."),
    "reply_not_found": ProblemExample(404, "The message it answers is not in this chat."),
    "session_not_found": ProblemExample(404, "There is no such session."),
    "shutting_down": ProblemExample(503, "The server is restarting; try again."),
    "storage_unavailable": ProblemExample(503, "Files cannot be stored or read now; try again later."),
    "too_many_attachments": ProblemExample(422, "A message has at most 10 files.", "attachments"),
    "too_many_pinned": ProblemExample(409, "At most 10 chats can be pinned."),
    "unsupported_media_type": ProblemExample(415, "Send JSON with Content-Type: application/json."),
    "user_not_found": ProblemExample(404, "There is no such user."),
    "username_reserved": ProblemExample(422, "This username is reserved.", "username"),
    "username_taken": ProblemExample(409, "Somebody has this username.", "username"),
    "weak_password": ProblemExample(422, "This is one of the most common passwords; choose another.", "password"),
    "wrong_password": ProblemExample(403, "The old password is wrong.", "old_password"),
}
