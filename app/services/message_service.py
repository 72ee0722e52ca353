"""Messages: sending, editing, deleting, marks, history. One path for socket and REST: the writer."""

from __future__ import annotations

import uuid

from sqlalchemy.ext.asyncio import AsyncSession

from app.core.clock import Clock, timestamp
from app.core.config import Settings
from app.core.errors import BadInput, Unavailable, chat_not_found, message_not_found
from app.db.database import Database
from app.db.events import (
    DeleteMessageCommand,
    EditMessageCommand,
    MessageDeliveredCommand,
    MessageReadCommand,
    NewMessageCommand,
)
from app.db.repositories import accounts as accounts_repository
from app.db.repositories import chat_log as log_repository
from app.db.repositories import chats as chats_repository
from app.db.repositories.chat_log import MessageRow
from app.db.schemas import MAX_ID, History, Message, Readers, is_blank
from app.services.caller import Caller
from app.services.chat_log.catch_up import visible_messages
from app.services.chat_log.changes import DeleteMessage, Done, EditMessage, Mark, SendMessage
from app.services.chat_log.views import hidden_view
from app.services.chat_log.writer import OnDone, Writer
from app.services.online import Online
from app.services.token_bucket import AccountLimit
from app.services.typing_service import TypingService
from app.services.unit_of_work import UnitOfWork, UnitOfWorkFactory

StoredCommand = (
    NewMessageCommand | EditMessageCommand | DeleteMessageCommand | MessageReadCommand | MessageDeliveredCommand
)


def check_length(content: str, max_chars: int) -> None:
    """Refuse a text too long for a message. Raises BadInput."""
    if len(content) > max_chars:
        raise BadInput("message_too_long", f"A message has at most {max_chars} characters.", field="content")


class MessageService:
    """What people do with messages."""

    def __init__(
        self,
        *,
        settings: Settings,
        clock: Clock,
        database: Database,
        writer: Writer,
        unit_of_work: UnitOfWorkFactory,
        typing: TypingService,
        limit: AccountLimit,
        online: Online,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._database = database
        self._writer = writer
        self._unit_of_work = unit_of_work
        self._typing = typing
        self._limit = limit
        self._online = online

    # --- writing ---

    def submit(self, user_id: int, command: StoredCommand, on_done: OnDone) -> None:
        """Queue a socket's command; `on_done` is called once it is committed or refused.

        Raises what can be refused at once: limits, sizes, an overloaded server.
        """
        self._writer.submit(self._change(user_id, command), on_done)

    async def mark(self, caller: Caller, command: MessageReadCommand | MessageDeliveredCommand) -> None:
        """Mark without a socket. Raises what refused it."""
        # First: once it is stored, push must not take it for the mark of another device, which has a socket.
        self._online.visit(caller.user_id, caller.session_id)
        await self.write(caller.user_id, command)

    async def write(self, user_id: int, command: StoredCommand) -> Done:
        """Do a command and wait until it is committed. Raises what refused it."""
        return await self._writer.write(self._change(user_id, command))

    def _change(self, user_id: int, command: StoredCommand) -> SendMessage | EditMessage | DeleteMessage | Mark:
        match command:
            case NewMessageCommand():
                self._check_sendable(command)
                self._limit.take(user_id)
                self._typing.end(user_id, command.chat_id)
                return SendMessage(
                    chat_id=command.chat_id,
                    user_id=user_id,
                    # Without an id of the client's a retry cannot be told from a second message.
                    client_id=(command.client_id or uuid.uuid4()).bytes,
                    content=command.content,
                    message_type=command.message_type,
                    reply_to=command.reply_to,
                    attachments=tuple(command.attachments),
                )
            case EditMessageCommand():
                self._check_content(command.content)
                self._limit.take(user_id)
                return EditMessage(command.chat_id, user_id, command.message_id, command.content)
            case DeleteMessageCommand():
                self._limit.take(user_id)
                return DeleteMessage(command.chat_id, user_id, command.message_id)
            case MessageReadCommand():
                return Mark(command.chat_id, user_id, command.message_id, "read")
            case MessageDeliveredCommand():
                return Mark(command.chat_id, user_id, command.message_id, "delivered")

    def _check_sendable(self, command: NewMessageCommand) -> None:
        files = command.attachments
        if command.content or not files:
            self._check_content(command.content)
        if len(files) > self._settings.max_attachments:
            raise BadInput(
                "too_many_attachments",
                f"A message has at most {self._settings.max_attachments} files.",
                field="attachments",
            )
        if len(set(files)) != len(files) or bool(files) != (command.message_type != "text"):
            raise BadInput(
                "attachment_mismatch",
                "Messages of every type but text hold files, each of them once; those of type text hold none.",
                field="attachments",
            )

    def _check_content(self, content: str) -> None:
        check_length(content, self._settings.max_message_chars)
        if is_blank(content):
            raise BadInput("message_empty", "A message needs some text.", field="content")

    async def send(self, user_id: int, command: NewMessageCommand | EditMessageCommand) -> Message:
        """Send or edit a message and return it as it is stored, and as the caller sees it."""
        done = await self.write(user_id, command)
        if done.message is None:
            raise RuntimeError("a message that was written has no message")
        is_edit = isinstance(command, EditMessageCommand)
        if is_edit or done.earlier:  # what the caller may have hidden
            try:
                async with self._database.reading() as session:
                    seq = done.message["seq"]
                    if await log_repository.list_hidden(session, user_id, command.chat_id, [seq]):
                        return hidden_view(done.message)
            except Unavailable:
                if not is_edit:  # else the text is the caller's own, and everybody has it by now
                    raise
        return done.message

    async def delete(self, user_id: int, command: DeleteMessageCommand) -> None:
        """Delete a message for everybody or for oneself."""
        if command.for_everyone:
            await self.write(user_id, command)
        else:
            self._limit.take(user_id)
            async with self._unit_of_work.of(user_id) as uow:
                await self._hide(uow, user_id, command.chat_id, command.message_id)

    async def _hide(self, uow: UnitOfWork, user_id: int, chat_id: int, message_id: int) -> None:
        """Delete a message for oneself only. Does nothing the second time."""
        session = uow.session
        row = await self._find_visible(session, user_id, chat_id, message_id)
        if await log_repository.list_hidden(session, user_id, chat_id, [row.seq]):
            return
        account_version = await uow.next_account_version(user_id)
        # Numbering has locked the user: now another device can no longer be hiding it too.
        if await log_repository.list_hidden(session, user_id, chat_id, [row.seq]):
            return
        await accounts_repository.hide_message(
            session,
            user_id=user_id,
            chat_id=chat_id,
            seq=row.seq,
            message_id=row.id,
            account_version=account_version,
        )
        uow.announce_account(
            user_id,
            {
                "type": "message_hidden",
                "account_version": account_version,
                "chat_id": chat_id,
                "message_id": row.id,
                "seq": row.seq,
            },
        )

    # --- reading ---

    async def history(
        self,
        user_id: int,
        chat_id: int,
        *,
        before: int | None,
        after: int | None,
        around: int | None,
        limit: int,
    ) -> History:
        """A page of a chat: the newest messages, those before or after a seq, between two, or around one."""
        limit = min(limit, self._settings.page_size_max)
        async with self._database.reading() as session:
            version = await chats_repository.chat_version(session, chat_id)
            member = await chats_repository.find_membership(session, chat_id, user_id)
            if member is None:
                raise chat_not_found()

            async def page(low: int, high: int, size: int, *, newest_first: bool) -> list[MessageRow]:
                return await chats_repository.list_messages(
                    session, chat_id, low=low, high=high, newest_first=newest_first, limit=size
                )

            first_visible = member.visible_from_seq
            low = first_visible if after is None else max(first_visible, after + 1)
            high = MAX_ID if before is None else before - 1
            if around is not None:
                older = await page(low, min(around, high), max(1, limit // 2), newest_first=True)
                rows = older + await page(max(low, around + 1), high, limit - len(older), newest_first=False)
            else:
                rows = await page(low, high, limit, newest_first=after is None)
            items = await visible_messages(session, user_id, chat_id, rows)
            oldest, newest = (rows[0].seq, rows[-1].seq) if rows else (low, min(high, low - 1))
            has_after = bool(await page(max(first_visible, newest + 1), MAX_ID, 1, newest_first=False))
            # seq is dense, so whoever does not see the first visible one sees something before.
            has_before = oldest > first_visible
            if not rows and has_before:  # unless the chat ends before `after`
                has_before = bool(await page(first_visible, low - 1, 1, newest_first=True))
            # Asked last, when all is read: nothing said after somebody was removed may reach them.
            if await chats_repository.find_membership(session, chat_id, user_id) is None:
                raise chat_not_found()
            return {"items": items, "version": version, "has_before": has_before, "has_after": has_after}

    async def get(self, user_id: int, chat_id: int, message_id: int) -> Message:
        """One message of a chat."""
        async with self._database.reading() as session:
            row = await self._find_visible(session, user_id, chat_id, message_id)
            [message] = await visible_messages(session, user_id, chat_id, [row])
            return message

    async def readers(self, user_id: int, chat_id: int, message_id: int) -> Readers:
        """Who has read a message, and whom it has reached; the sender aside.

        The same whether or not a block stands between them: what it hid or showed would tell of it.
        """
        async with self._database.reading() as session:
            message = await self._find_visible(session, user_id, chat_id, message_id)
            [chat] = await log_repository.find_chats(session, [chat_id])
            # Of the peer of a personal chat, what its log has told; everybody knows their own mark.
            public = chat.type == "personal" and message.sender_id == user_id
            rows = await chats_repository.list_readers(session, chat_id, message.seq, public=public)
        reached = [row for row in rows if row[0] != message.sender_id]
        return {
            "read_by": [
                {"user_id": member_id, "read_at": timestamp(read_at) if read_at else None}
                for member_id, read_seq, read_at in reached
                if read_seq >= message.seq
            ],
            "delivered_to": [member_id for member_id, _, _ in reached],
        }

    async def _find_visible(self, session: AsyncSession, user_id: int, chat_id: int, message_id: int) -> MessageRow:
        # The message first: one sent after the caller's removal must meet a membership that has ended.
        rows = await log_repository.find_messages(session, [message_id])
        member = await chats_repository.find_membership(session, chat_id, user_id)
        if member is None:
            raise chat_not_found()
        if not rows or rows[0].chat_id != chat_id or rows[0].seq < member.visible_from_seq:
            raise message_not_found()
        return rows[0]
