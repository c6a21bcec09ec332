---@meta moonrabbit.core
--- The C module `moonrabbit.core`: the AMQP engine (csrc/core) as Lua sees it. No sockets, no clock.
--- Users meet `moonrabbit`, not this; it is written down for the layers above and for editors.
---
--- A command that the engine refuses answers `nil, status`, with `status` one of
--- "closed" "blocked" "window" "overflow" "too_large" "memory" "no_channels" "bad_argument".
--- Wrong types, unknown options and short strings over 255 bytes throw, naming the argument.

---@class moonrabbit.core
---@field null userdata                 AMQP's void; `moonrabbit.null`
---@field types table<string, function> timestamp bytes decimal boolean int8 uint8 int16 uint16 int32 uint32 int64 uint64 float double -> a Typed
---@field message_methods table         methods of every Message: Lua fills it in
---@field confirmation_methods table    methods of every Confirmation: Lua fills it in
local core = {}

--- A value with an exact wire type; equal (==) to one of the same type and value. Integers take a number
--- or a string of digits (exact in every Lua); `types.decimal(unscaled, scale)`: decimal(1234, 2) is 12.34,
--- with `.scale` and `.unscaled`. uint64 is sent as a signed 64-bit integer, as RabbitMQ knows no other.
--- Decimals come back as Typed, and integers this Lua cannot hold exactly (`tostring` gives their digits).
---@class moonrabbit.core.Typed : userdata
---@field type string
---@field value any

--- A number, 0 <= x < 1, of a generator that the system seeds, and seeds anew in a process that was forked.
---@return number
function core.random() end

--- Bytes of the system's.
---@param n integer 1 to 256
---@return string
function core.random_bytes(n) end

---@class moonrabbit.core.Config
---@field vhost string
---@field user string?
---@field password string?
---@field mechanism "PLAIN"|"AMQPLAIN"|"EXTERNAL"|nil
---@field heartbeat integer?        seconds, 0: none
---@field frame_max integer?        bytes
---@field channel_max integer?
---@field max_message_size number?  bytes
---@field max_buffer number?        bytes
---@field ack_delay number?         seconds
---@field client_properties table?

---@param config moonrabbit.core.Config
---@return moonrabbit.core.Engine
function core.engine(config) end

---@class moonrabbit.core.Engine : userdata
local Engine = {}

---@param now number
function Engine:start(now) end
--- Copies received bytes in. Returns how many were taken: fewer than given means that `pump` must
--- be called before the rest is fed. None are taken while the DeliveryQueue of a no-ack consumer holds
--- 4096 messages or 16 MiB of bodies, or that of another 64 messages more than twice its prefetch (65535 where that
--- is not known; a broker that keeps to a prefetch stays below), until it is popped to less than half of that,
--- discarded or cancelled. What has been received already still comes out of `pump`.
---@return integer taken
function Engine:feed(bytes, now) end
--- Everything that is to be written now, or its first `most` bytes, as one string (maybe ""), counted as written.
---@param now number
---@param most integer? bytes; long strings are dear
---@return string
function Engine:drain(now, most) end
---@return integer bytes waiting to be written
function Engine:pending() end
--- Takes input again although a queue is full, until its next delivery: for a task that waits for an
--- answer which only reading can bring.
function Engine:admit() end
--- Whether a DeliveryQueue holds more than it may.
---@return boolean
function Engine:is_full() end
--- When `tick` wants to be called, or nil for never.
---@return number?
function Engine:deadline(now) end
--- When a broker that goes on saying nothing is taken for gone (part of `deadline`), or nil for never.
---@return number?
function Engine:silence_deadline() end
--- Does nothing when it is called by a finalizer within `pump`.
function Engine:tick(now) end
---@param text string? how the transport ended
function Engine:eof(text) end
---@param paused boolean
function Engine:pause(paused, now) end
---@return boolean
function Engine:is_open() end
---@return boolean
function Engine:is_blocked() end
--- While publishing is held, publishes answer "blocked".
---@param held boolean
function Engine:hold(held) end
---@return integer channel_max, integer frame_max, integer heartbeat
function Engine:tuned() end
---@return table
function Engine:server_properties() end
---@return true|nil, string? status
function Engine:close(code, text) end
---@return true|nil, string? status   the reply event's `owner` is nil, method "connection.update-secret-ok"
function Engine:update_secret(secret, reason) end

--- Takes received frames and does what needs no Lua; returns as soon as Lua must know something:
---   nil                                          nothing more for now
---   "open"
---   "reply", owner, method, fields               e.g. "queue.declare-ok", { queue = …, message_count = … };
---                                                answers the oldest call of that channel (owner nil: of the connection)
---   "get", owner, message                        answers the oldest call, a basic.get
---   "return", owner, message, seq|nil            a message came back (message.reply_code, .reply_text); seq when it was
---                                                a publish of a confirm channel (its Confirmation is marked by itself)
---   "confirm", owner                             some publishes of this channel were settled (coalesced: once a pump)
---   "failed", owner, seq, outcome, confirmation  "nacked" or "unroutable"; the Confirmation knows it too
---   "deliver", owner, queue                      a DeliveryQueue that was empty no longer is
---   "cancel", owner, consumer_tag, queue         the broker cancelled a consumer
---   "flow", owner, active
---   "channel_closed", owner, err                 err = { kind, code, text, class, method } (plain table; numbers that
                                                are 0 are left out; kind may be "memory")
---   "blocked", reason         "unblocked"
---   "closed", err                                the last one
--- Deliveries that came before another event are in their queue when it is returned. A delivery for a queue
--- that is gone or discarded goes back to the broker.
---@return string? event, any a, any b, any c, any d
function Engine:pump() end

--- Queues channel.open; a "reply" with "channel.open-ok" follows. `owner` is the Lua object that
--- events, messages and confirmations of this channel lead to.
---@param owner table
---@return moonrabbit.core.Channel|nil, string? status
function Engine:open_channel(owner) end

---@class moonrabbit.core.Channel : userdata
local Channel = {}

---@return integer
function Channel:id() end
---@return boolean
function Channel:is_open() end
--- Any method without content, by its AMQP name and with its AMQP field names (dashes as
--- underscores, "nowait" and "if_unused" as rabbitmq-c names them): call("queue.declare", { queue = "q", durable = true, arguments = {…} }).
--- Not connection.*, channel.open and close, basic.consume, get, ack, nack, reject: they have functions of their own.
---@return true|nil, string? status
function Channel:call(method, fields) end
--- basic.consume; fields as in `call`, consumer_tag must be set. A "reply" follows.
---@param fields table
---@param prefetch integer? what the broker was told for it: how far it is trusted with memory
---@return moonrabbit.core.DeliveryQueue|nil, string? status
function Channel:consume(fields, prefetch) end
--- basic.get: a "get" or a "reply" with "basic.get-empty" follows.
---@return true|nil, string? status
function Channel:get(queue, no_ack) end
---@return true|nil, string? status
function Channel:close(code, text) end
--- Publishes. opts: exchange, routing_key (both "" by default), mandatory, persistent and every
--- property (content_type content_encoding headers delivery_mode priority correlation_id reply_to
--- expiration message_id timestamp type user_id app_id cluster_id). mandatory and persistent
--- default to true on a confirm channel, to false elsewhere; delivery_mode wins over persistent.
--- expiration may be a number of milliseconds. `timeout` is allowed, and left to the layer above.
---@param body string
---@param opts table?
---@return moonrabbit.core.Confirmation|true|nil confirmation true where the channel has no confirms
---@return boolean|string flush_or_status whether bytes should leave now; a status after nil
function Channel:publish(body, opts) end
--- With a number the Confirmation is held: it may be published again, and until it is concluded everything
--- but an ack counts as pending, the end of its channel too. The number is written, as 12 hexadecimal digits,
--- over the end of the route's message id ("bad_argument" where that is shorter).
---@param route moonrabbit.core.Route
---@param body string
---@param number integer? the publisher's own, from 1
---@param again moonrabbit.core.Confirmation? of the publish before, of whatever channel: it goes on with this one
---@return moonrabbit.core.Confirmation|true|nil, boolean|string
function Channel:publish_route(route, body, number, again) end
--- The held Confirmation of what is yet to be published; the channel may have ended.
---@param number integer
---@return moonrabbit.core.Confirmation
function Channel:hold(number) end
--- Publishes what core.pack has packed; number and again as for publish_route, but the properties stay as they are.
---@param mandatory boolean
---@param props string
---@param number integer?
---@param again moonrabbit.core.Confirmation?
---@return moonrabbit.core.Confirmation|true|nil, boolean|string
function Channel:publish_packed(exchange, routing_key, mandatory, props, body, number, again) end
--- Sends a message on, byte for byte, but for the headers set and removed.
---@param message moonrabbit.core.Message
---@param set table?       headers to add or replace
---@param remove string[]? names of headers to leave out ("moonrabbit-seq" always is)
---@param properties_remove string[]? names of properties to leave out, e.g. "expiration"
---@return moonrabbit.core.Confirmation|true|nil, boolean|string
function Channel:forward(message, exchange, routing_key, mandatory, set, remove, properties_remove) end
---@param n integer 0: no bound
function Channel:set_window(n) end
---@return integer publishes not settled yet; 0 once the channel has ended
function Channel:unconfirmed() end
---@return integer publishes that were unsettled when the channel or connection ended; 0 before
function Channel:lost() end
--- kind: "ack" or "nack". Every outstanding delivery up to tag; 0: all.
---@return true|nil, boolean|string
function Channel:settle_upto(tag, kind, requeue) end
--- Settles by tag: kind "ack" "nack" "reject". Statuses also "settled" and "unknown_tag": the channel has had
--- no delivery of that tag. "closed" says that the broker has taken the delivery back: the channel or connection
--- ended, or basic.recover was called since (also for what was settled before the recover). What tx.rollback
--- gives back can be settled again, as soon as the rollback was called.
---@return true|nil, boolean|string
function Channel:settle(tag, kind, requeue) end
---@return true|nil, string?
function Channel:flush_acks() end
---@return integer deliveries not settled yet
function Channel:unsettled() end

--- A prepared route; opts as for Channel:publish, encoded once.
---@param opts table
---@param confirm boolean whether the defaults of a confirm channel hold
---@return moonrabbit.core.Route
function core.route(opts, confirm) end

---@class moonrabbit.core.Route : userdata

---@class moonrabbit.core.DeliveryQueue : userdata
local DeliveryQueue = {}
---@return moonrabbit.core.Message?
function DeliveryQueue:pop() end
--- Gives everything in it, and what still comes, back to the broker (no-ack deliveries are dropped).
function DeliveryQueue:discard() end
---@return integer
function DeliveryQueue:count() end

--- Message fields: body exchange routing_key redelivered delivery_tag consumer_tag properties headers
--- message_id (of the properties, without making them), channel (the owner), message_count (of get), reply_code and reply_text (of a return). Each is
--- made when it is read; properties and headers are kept once made.
---@class moonrabbit.core.Message : userdata

---@class moonrabbit.core.Confirmation : userdata

--- The hot path of `msg:ack()`: settles; true when the bytes should leave now, false when not, and the
--- owner. nil, status: "settled"; "closed" (the broker took the delivery back, as in Channel:settle; that is no
--- mistake of the caller's); "unknown_tag" (nothing to settle: no_ack, or a returned message).
---@return boolean|nil, table|string owner_or_status
function core.ack(message) end
--- Makes a method that acks a message. It calls `full(message)`, which is to call core.ack and to see to it that the
--- engine's deadline is looked at, and returns its two results; until the output is looked at next (a stream's flush,
--- Engine:drain), further acks are taken without it. When bytes should leave now it calls `flush(owner)`. Neither may
--- yield.
---@param full fun(message: moonrabbit.core.Message): true|nil, table?
---@param flush fun(owner: table)
---@return fun(message: moonrabbit.core.Message): true|nil, table?
function core.acker(full, flush) end
---@param kind "nack"|"reject"
---@param requeue boolean
---@return boolean|nil, table|string owner_or_status
function core.settle(message, kind, requeue) end
--- Whether a message is still to be settled: true, or nil and what `ack` would answer.
---@return true|nil, string? status
function core.outstanding(message) end
--- The routing key of a message that has no header of that name, without making the table of all; nil for one that has
--- it, and for what is no message.
---@param message any
---@param name string
---@return string?
function core.key_without(message, name) end
--- "pending" "acked" "nacked" "unroutable" "lost"
---@param confirmation moonrabbit.core.Confirmation
---@return string outcome, integer seq, integer? number of a held one
function core.outcome(confirmation) end
--- It is not published again: from now on this is its outcome.
---@param confirmation moonrabbit.core.Confirmation
---@param outcome "nacked"|"unroutable"|"lost"
function core.conclude(confirmation, outcome) end
--- Two rings, of confirmations and of what was published; the place of number n is (n - 1) % size + 1. Empties
--- the latter (false) from `first` on, as long as the publish is acked and a string.
---@return integer first the first number that was left, integer bytes of the strings
function core.take_acked(confirmations, kept, first, last, size) end
--- What a publish with these options (as for Channel:publish) is made of.
---@param opts table?
---@param confirm boolean whether the defaults of a confirm channel hold
---@return string|nil exchange, string routing_key_or_status, boolean mandatory, string props
function core.pack(opts, confirm) end
--- Packed properties with headers added or replaced; all else stays byte for byte.
---@param props string
---@param set table
---@return string|nil props, string? status
function core.set_headers(props, set) end
--- The hot path of waiting: true when acked, false when still pending, nil for any other outcome.
---@return boolean?
function core.acked(confirmation) end
--- The owner of a message's or confirmation's channel.
---@return table owner
function core.owner(object) end
---@param value any
---@return boolean
function core.is_message(value) end

--- Encodes a Lua table as an AMQP table and back: for tests and tools.
---@param is_arguments boolean? integral floats become integers
---@return string
function core.encode_table(t, is_arguments) end
---@return table
function core.decode_table(bytes) end

--- rabbitmq-c's version.
---@return string
function core.codec_version() end

return core
