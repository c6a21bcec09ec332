--- What `mr.app` may be given: the fields of an app, of its exchanges, queues and consumers, and what each may hold.
-- @module moonrabbit.app.plan

local options = require "moonrabbit.options"

local shortstr, boolean, integer = options.shortstr, options.boolean, options.integer

---@class moonrabbit.AppOptions
---@field name string                                         of the app: in connection names, metrics, and the names of its retry queues
---@field exchanges table<string, moonrabbit.AppExchangeOptions>?
---@field queues table<string, moonrabbit.AppQueueOptions>?
---@field consumers moonrabbit.AppConsumerOptions[]  at least one
---@field ladder (string|table)?                              the app's name by default. See docs/retry.md
---@field connect (string|moonrabbit.ConnectOptions)?         where `start` without an argument connects to; "amqp://" by default
---@field log fun(level: string, text: string)?               the connection's by default
---@field observer table?                                     functions that are told what happens: docs/app.md
---@field trace boolean?                                      what handlers publish carries the trace of the message: moonrabbit.trace; true by default

---@class moonrabbit.AppExchangeOptions
---@field type string?        "direct", "fanout", "topic" (the default), "headers", or a plugin's
---@field durable boolean?    true by default
---@field auto_delete boolean?  goes when the last binding from it does; false by default
---@field internal boolean?  nobody may publish to it, only exchanges bound to it; false by default
---@field alternate string?   the exchange that gets what no binding takes
---@field bind table[]?       { exchange, key, arguments = … }: what those exchanges route here comes here too
---@field arguments table?  of the declaration
---@field passive boolean?    somebody else declares it: only verified

---@class moonrabbit.AppQueueOptions
---@field type ("classic"|"quorum"|"stream")?  "classic" by default
---@field durable boolean?    true by default
---@field exclusive boolean?  for this connection only, and gone with it; false by default
---@field auto_delete boolean?  goes when its last consumer does; false by default
---@field bind table[]?       { exchange, key, arguments = … }
---@field arguments table?    such as `x-max-length`
---@field passive boolean?    somebody else declares it: only verified

---@class moonrabbit.AppConsumerOptions
---@field queue string            one of `queues`
---@field handler function?       (message, app); or:
---@field route any?              a target: moonrabbit.app.route
---@field prefetch integer?       unsettled messages that the broker may have out; 4 times the concurrency and at least 64 by default
---@field concurrency integer?    handlers that run at once; 16 by default, 1 where `dedupe` joins a transaction
---@field timeout number?         seconds after which a run counts as failed; none by default
---@field retry function?         a policy (message, failure, attempt) -> seconds | nil; without it nothing is retried
---@field dead_letter (string|false)?  the queue for what failed for good; the app's name and ".dead" by default; false: it is rejected
---@field in_process (number|boolean)? retries with delays up to so many seconds are waited for in the process; 0.1 by default; true: all, as always for streams and exclusive queues; false: none
---@field hold number?            seconds for which a copy that fails is tried again; 300 by default, math.huge for streams
---@field ladder (string|table)?  the app's by default
---@field dedupe table?           a store, or { store, key, lease, away, missing }: moonrabbit.app.runner.dedupe
---@field order_by (fun(message: moonrabbit.Message): any)?  messages of one key one at a time, in order
---@field batch moonrabbit.AppBatchOptions?      the handler gets a list of messages
---@field rate (number|table)?    messages a second, or { limit, burst }
---@field breaker moonrabbit.AppBreakerOptions?  pauses the consumer when too much fails
---@field partitions (integer|table)?            a number of queues, or { count, by = { header = … } }
---@field priority integer?  of a lower one messages come only while the others have all they may; 0 by default
---@field arguments table?        of the subscription, such as `x-stream-offset`

---@class moonrabbit.AppBatchOptions
---@field size integer   the most messages of a batch
---@field wait number    seconds that its first message waits for others

---@class moonrabbit.AppBreakerOptions
---@field failures integer  so many …
---@field within number?    … within so many seconds pause the consumer; 60 by default
---@field pause number?     seconds until one message is tried; 10 by default
---@field hold number?      seconds that messages are kept during a pause, then they go back; 300 by default

-- Tables for options.check, by what they are the fields of.
local fields = {}

local function over_zero(what)
  return function(value)
    if type(value) ~= "number" or not (value > 0 and value < math.huge) then
      return "a number " .. what .. ", over 0"
    end
  end
end

local seconds_over_zero = over_zero "of seconds"

local function callable(value)
  local meta = getmetatable(value)
  if type(value) ~= "function" and not (type(value) == "table" and type(meta) == "table" and meta.__call) then
    return "a function"
  end
end

local function key_of_dedupe(value)
  if type(value) == "function" or value == "message_id" then return nil end
  if type(value) == "string" and value:find "^header:." then return nil end
  return '"message_id", "header:NAME" or a function'
end

local function queue_or_false(value)
  if value == false or type(value) == "string" and value ~= "" and #value <= 255 then return nil end
  return "the name of a queue, or false"
end

local function list_of_bindings(value)
  if type(value) ~= "table" then return "a list of { exchange, key }" end
  local count = 0
  for _ in pairs(value) do count = count + 1 end
  for i = 1, math.max(count, #value) do
    local each = value[i]
    if type(each) ~= "table" or type(each[1]) ~= "string" or (each[2] ~= nil and type(each[2]) ~= "string")
      or (each.arguments ~= nil and type(each.arguments) ~= "table") then
      return "a list of { exchange, key, arguments = … }: entry " .. i .. " is none;"
    end
    for name in pairs(each) do
      if name ~= 1 and name ~= 2 and name ~= "arguments" then
        return ("a list of { exchange, key, arguments = … }: entry %d has an unknown field '%s';"):format(i,
          tostring(name))
      end
    end
  end
end

fields.app = {
  name = shortstr, exchanges = options.table, queues = options.table, consumers = options.table,
  ladder = options.either(shortstr, options.table), connect = options.either(options.string, options.table),
  log = options.callback, observer = options.table, trace = boolean,
}

fields.observer = {}
for _, name in ipairs { "delivered", "settled", "failed", "published", "in_flight", "runner", "canary", "event" } do
  fields.observer[name] = options.callback
end

fields.exchange = {
  type = shortstr, durable = boolean, auto_delete = boolean, internal = boolean, alternate = shortstr,
  bind = list_of_bindings, arguments = options.table, passive = boolean,
}

fields.queue = {
  type = options.one_of("classic", "quorum", "stream"), durable = boolean, exclusive = boolean,
  auto_delete = boolean, bind = list_of_bindings, arguments = options.table, passive = boolean,
}

fields.consumer = {
  queue = shortstr, handler = options.callback, route = options.any, prefetch = integer(1, 65535),
  concurrency = integer(1, 65535), timeout = seconds_over_zero, retry = callable,
  dead_letter = queue_or_false, in_process = options.either(options.seconds, boolean),
  hold = options.seconds,
  ladder = options.either(shortstr, options.table), dedupe = options.table, order_by = options.callback,
  batch = options.table, rate = options.either(over_zero "of messages a second", options.table),
  breaker = options.table, partitions = options.either(integer(1, 1000), options.table),
  priority = integer(-2147483648, 2147483647), arguments = options.table,
}

fields.batch = { size = integer(1, 65535), wait = seconds_over_zero }
fields.rate = { limit = over_zero "of messages a second", burst = integer(1, 1e9) }
fields.breaker = {
  failures = integer(1, 1e9), within = seconds_over_zero, pause = seconds_over_zero, hold = seconds_over_zero,
}
fields.partition = { count = integer(1, 1000), by = options.table, exchange = shortstr }
fields.by = { header = shortstr, property = options.one_of("message_id", "correlation_id", "timestamp") }
fields.dedupe = {
  store = options.table, key = key_of_dedupe, lease = seconds_over_zero,
  away = options.one_of("wait", "go_on"), missing = options.one_of("handle", "fail"),
}

return fields
