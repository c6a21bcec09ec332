--- Kinds of queues: what `Channel:queue_declare` and `Channel:consume` are to be given for each, checked.
--
--     local queue = require "moonrabbit.queue"
--     ch:queue_declare("orders", queue.quorum { delivery_limit = 5, dead_letter_exchange = "dead" })
--     ch:consume("log", { prefetch = 100, arguments = queue.offset "first" })
--
-- A kind returns options for queue_declare: { durable = true, arguments = { ["x-queue-type"] = …, … } }. What a kind of
-- queue cannot have is no option of its function, and combinations that the broker would ignore throw. Times are in
-- seconds, as everywhere.
-- @module moonrabbit.queue

local options = require "moonrabbit.options"

local queue = {}

local check = options.check
local shortstr, boolean, seconds = options.shortstr, options.boolean, options.seconds
local count = options.integer(0, 2147483647)
local positive = options.integer(1, 9007199254740991)

local locators = options.one_of("client-local", "balanced")

-- What every kind but streams may have: option -> its argument.
---@class moonrabbit.AnyQueueOptions
---@field ttl number?          seconds after which a message is dropped or dead-lettered (x-message-ttl)
---@field expires number?      seconds without use after which the queue is deleted (x-expires)
---@field max_length integer?  messages (x-max-length)
---@field max_bytes integer?   bytes of bodies (x-max-length-bytes)
---@field overflow string?     what happens beyond that: "drop-head" (the broker's default) drops the oldest, "reject-publish" nacks publishes
---@field dead_letter_exchange string?     where dropped, rejected and expired messages go; "" is the default exchange
---@field dead_letter_routing_key string?  with this key instead of their own
---@field single_active_consumer boolean?  one consumer at a time, the next one when it goes. https://www.rabbitmq.com/docs/consumers#single-active-consumer
---@field leader_locator string?  "client-local" or "balanced" (x-queue-leader-locator)
---@field arguments table?     further arguments, over these

local common = {
  ttl = seconds, expires = seconds, max_length = count, max_bytes = positive,
  dead_letter_exchange = shortstr, dead_letter_routing_key = shortstr, single_active_consumer = boolean,
  leader_locator = locators, arguments = options.table,
}

local function milliseconds(value) return value and math.floor(value * 1000 + 0.5) end

local function common_arguments(opts, kind)
  return {
    ["x-queue-type"] = kind,
    ["x-message-ttl"] = milliseconds(opts.ttl),
    ["x-expires"] = milliseconds(opts.expires),
    ["x-max-length"] = opts.max_length,
    ["x-max-length-bytes"] = opts.max_bytes,
    ["x-overflow"] = opts.overflow,
    ["x-dead-letter-exchange"] = opts.dead_letter_exchange,
    ["x-dead-letter-routing-key"] = opts.dead_letter_routing_key,
    ["x-single-active-consumer"] = opts.single_active_consumer or nil,
    ["x-queue-leader-locator"] = opts.leader_locator,
  }
end

local function finish(what, opts, arguments, declared)
  if opts.dead_letter_routing_key and not opts.dead_letter_exchange then
    error(what .. ": option 'dead_letter_routing_key' needs 'dead_letter_exchange'", 3)
  end
  if opts.overflow and not (opts.max_length or opts.max_bytes) and opts.dead_letter_strategy ~= "at-least-once" then
    error(what .. ": option 'overflow' needs 'max_length' or 'max_bytes'", 3)
  end
  for name, value in pairs(opts.arguments or {}) do arguments[name] = value end
  declared.arguments = arguments
  return declared
end

---@class moonrabbit.ClassicQueueOptions : moonrabbit.AnyQueueOptions
---@field durable boolean?       true by default
---@field exclusive boolean?     of this connection, and gone with it; false by default
---@field auto_delete boolean?   gone with its last consumer; false by default
---@field overflow string?       also "reject-publish-dlx"
---@field max_priority integer?  1 to 255, better at most 10: messages have priorities. https://www.rabbitmq.com/docs/priority
---@field lazy boolean?          keeps messages on disk (x-queue-mode; from 3.12 on every classic queue does). https://www.rabbitmq.com/docs/lazy-queues
---@field version integer?       1 or 2 (x-queue-version, 3.10 and later)

local classic_options = options.merge(common, {
  durable = boolean, exclusive = boolean, auto_delete = boolean,
  overflow = options.one_of("drop-head", "reject-publish", "reject-publish-dlx"),
  max_priority = options.integer(1, 255), lazy = boolean, version = options.integer(1, 2),
})

--- A classic queue: on one node, or mirrored by a policy (moonrabbit.management, `mirror`) where the broker is 3.x.
--- https://www.rabbitmq.com/docs/classic-queues
---@param opts moonrabbit.ClassicQueueOptions?
---@return moonrabbit.QueueDeclareOptions
function queue.classic(opts)
  opts = check("queue.classic", opts, classic_options)
  local arguments = common_arguments(opts, "classic")
  arguments["x-max-priority"] = opts.max_priority
  arguments["x-queue-mode"] = opts.lazy and "lazy" or nil
  arguments["x-queue-version"] = opts.version
  local declared = finish("queue.classic", opts, arguments, {
    durable = opts.durable ~= false, exclusive = opts.exclusive, auto_delete = opts.auto_delete,
  })
  return declared
end

---@class moonrabbit.QuorumQueueOptions : moonrabbit.AnyQueueOptions
---@field delivery_limit integer?  a message that came back so often is dropped or dead-lettered (x-delivery-limit; from 4.0 on 20 unless set)
---@field group_size integer?      so many nodes have it at first (x-quorum-initial-group-size); an odd number
---@field dead_letter_strategy string?  "at-most-once" (the broker's default), or "at-least-once": dead letters survive a crash; needs overflow = "reject-publish"

local quorum_options = options.merge(common, {
  overflow = options.one_of("drop-head", "reject-publish"), delivery_limit = count,
  group_size = options.integer(1, 99), dead_letter_strategy = options.one_of("at-most-once", "at-least-once"),
})

--- A quorum queue: durable, on several nodes, and there as long as most of them are.
--- https://www.rabbitmq.com/docs/quorum-queues
---@param opts moonrabbit.QuorumQueueOptions?
---@return moonrabbit.QueueDeclareOptions
function queue.quorum(opts)
  opts = check("queue.quorum", opts, quorum_options)
  if opts.dead_letter_strategy == "at-least-once" then
    if opts.overflow ~= "reject-publish" then
      error("queue.quorum: dead_letter_strategy \"at-least-once\" needs overflow = \"reject-publish\": without it the "
        .. "broker falls back to at-most-once", 2)
    end
    if not opts.dead_letter_exchange then
      error("queue.quorum: option 'dead_letter_strategy' needs 'dead_letter_exchange'", 2)
    end
  end
  local arguments = common_arguments(opts, "quorum")
  arguments["x-delivery-limit"] = opts.delivery_limit
  arguments["x-quorum-initial-group-size"] = opts.group_size
  arguments["x-dead-letter-strategy"] = opts.dead_letter_strategy
  local declared = finish("queue.quorum", opts, arguments, { durable = true })
  return declared
end

---@class moonrabbit.StreamOptions
---@field max_bytes integer?      the oldest are dropped beyond so many bytes (x-max-length-bytes)
---@field max_age number?         seconds; older ones are dropped, whole segments at a time (x-max-age)
---@field segment_bytes integer?  of a file of it (x-stream-max-segment-size-bytes)
---@field group_size integer?     so many nodes have it at first (x-initial-cluster-size)
---@field leader_locator string?  "client-local" or "balanced" (x-queue-leader-locator)
---@field arguments table?        further arguments, over these

local stream_options = {
  max_bytes = positive, max_age = options.number(1), segment_bytes = options.integer(1, 3000000000),
  group_size = options.integer(1, 99), leader_locator = locators, arguments = options.table,
}

--- A stream: messages stay when they are consumed, and every consumer starts where it likes (`queue.offset`). Consumers
--- need a prefetch, and their acks are what lets the broker send more. https://www.rabbitmq.com/docs/streams
---@param opts moonrabbit.StreamOptions?
---@return moonrabbit.QueueDeclareOptions
function queue.stream(opts)
  opts = check("queue.stream", opts, stream_options)
  local declared = finish("queue.stream", { arguments = opts.arguments }, {
    ["x-queue-type"] = "stream",
    ["x-max-length-bytes"] = opts.max_bytes,
    ["x-max-age"] = opts.max_age and ("%ds"):format(math.floor(opts.max_age)) or nil,
    ["x-stream-max-segment-size-bytes"] = opts.segment_bytes,
    ["x-initial-cluster-size"] = opts.group_size,
    ["x-queue-leader-locator"] = opts.leader_locator,
  }, { durable = true })
  return declared
end

-- ---- Where a stream's consumer starts ---------------------------------------------------------------

local units = { Y = true, M = true, D = true, h = true, m = true, s = true }

--- Arguments of `Channel:consume` that say where to start in a stream.
---@param from string|integer|userdata   "first", "last" (its last chunk), "next" (what comes from now on; the broker's default), an offset (0 is the first message), a time (`moonrabbit.types.timestamp`), or how long ago: "1h", "30m", "90s", "7D"
---@return table arguments   { ["x-stream-offset"] = … }
function queue.offset(from)
  local kind = type(from)
  local fits
  if kind == "string" then
    local number, unit = from:match "^(%d+)(%a)$"
    fits = from == "first" or from == "last" or from == "next" or number and units[unit]
  elseif kind == "number" then
    fits = from >= 0 and from == math.floor(from) and from <= 9007199254740991
  elseif kind == "userdata" then
    local known, name = pcall(function() return from.type end)
    fits = known and name == "timestamp"
  end
  if not fits then
    error("queue.offset: \"first\", \"last\", \"next\", an offset, a types.timestamp or an age such as \"1h\" expected"
      .. ", not " .. (kind == "string" and "\"" .. from:sub(1, 64) .. "\"" or kind == "number" and tostring(from)
      or "a " .. kind), 2)
  end
  return { ["x-stream-offset"] = from }
end

return queue
