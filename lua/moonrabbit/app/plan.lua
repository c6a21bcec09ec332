--- Checks what `mr.app` was given, all of it, before anything is connected or declared; and fills in what was
-- left out. A mistake throws with the line of the script, what was wrong, and what was expected.
-- @module moonrabbit.app.plan

local Ladder = require "moonrabbit.app.ladder"
local compile = require "moonrabbit.app.route.compile"
local connection_options = require "moonrabbit.connection.options"
local cycles = require "moonrabbit.app.cycles"
local options = require "moonrabbit.options"
local partitions = require "moonrabbit.app.flow.partitions"
local route = require "moonrabbit.app.route"

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

local plan = {}

-- ---- Kinds ------------------------------------------------------------------------------------------

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

--- The fields of an app. Other modules may add theirs.
plan.app = {
  name = shortstr, exchanges = options.table, queues = options.table, consumers = options.table,
  ladder = options.either(shortstr, options.table), connect = options.either(options.string, options.table),
  log = options.callback, observer = options.table, trace = boolean,
}

plan.exchange = {
  type = shortstr, durable = boolean, auto_delete = boolean, internal = boolean, alternate = shortstr,
  bind = list_of_bindings, arguments = options.table, passive = boolean,
}

plan.queue = {
  type = options.one_of("classic", "quorum", "stream"), durable = boolean, exclusive = boolean,
  auto_delete = boolean, bind = list_of_bindings, arguments = options.table, passive = boolean,
}

plan.consumer = {
  queue = shortstr, handler = options.callback, route = options.any, prefetch = integer(1, 65535),
  concurrency = integer(1, 65535), timeout = seconds_over_zero, retry = callable,
  dead_letter = queue_or_false, in_process = options.either(options.seconds, boolean),
  hold = options.seconds,
  ladder = options.either(shortstr, options.table), dedupe = options.table, order_by = options.callback,
  batch = options.table, rate = options.either(over_zero "of messages a second", options.table),
  breaker = options.table, partitions = options.either(integer(1, 1000), options.table),
  priority = integer(-2147483648, 2147483647), arguments = options.table,
}

local batch_options = { size = integer(1, 65535), wait = seconds_over_zero }
local rate_options = { limit = over_zero "of messages a second", burst = integer(1, 1e9) }
local breaker_options = {
  failures = integer(1, 1e9), within = seconds_over_zero, pause = seconds_over_zero, hold = seconds_over_zero,
}
local partition_options = { count = integer(1, 1000), by = options.table, exchange = shortstr }
local by_options = { header = shortstr, property = options.one_of("message_id", "correlation_id", "timestamp") }
local dedupe_options = {
  store = options.table, key = options.either(shortstr, options.callback), lease = seconds_over_zero,
  away = options.one_of("wait", "go_on"), missing = options.one_of("handle", "fail"),
}

-- ---- Checking ---------------------------------------------------------------------------------------

local Mistake = {}

-- Ends the check; caught in plan.compile.
local function bad(text, ...) error(setmetatable({ text:format(...) }, Mistake), 0) end

local function check(what, given, schema)
  if type(given) ~= "table" then bad("%s must be a table, not a %s", what, type(given)) end
  local ok, problem = pcall(options.check, what, given, schema, -1)
  if not ok then bad("%s", problem) end
end

local function sorted_names(what, map)
  local names = {}
  for name in pairs(map or {}) do
    if type(name) ~= "string" or name == "" or #name > 255 then
      bad("%s: a name must be a string of 1 to 255 bytes, not %s", what,
        type(name) == "string" and "one of " .. #name or "a " .. type(name))
    end
    names[#names + 1] = name
  end
  table.sort(names)
  return names
end

local function known(what, kind, name, map)
  if map[name] then return end
  local hint = options.nearest(name, map)
  bad("%s: %s is not among %ss%s; one that somebody else declares: ['%s'] = { passive = true }", what,
    ("the %s '%s'"):format(kind, name), kind, hint and " (did you mean '" .. hint .. "'?)" or "", name)
end

local function known_exchange(what, name, spec)
  if not name:find "^amq%." then known(what, "exchange", name, spec.exchanges or {}) end
end

local function check_exchanges(spec)
  for _, name in ipairs(sorted_names("exchanges", spec.exchanges)) do
    local what, exchange = ("exchanges['%s']"):format(name), spec.exchanges[name]
    check(what, exchange, plan.exchange)
    if name:find "^amq%." and not exchange.passive then
      bad("%s: names that begin with amq. are the broker's", what)
    end
    if exchange.alternate then known_exchange(what .. ".alternate", exchange.alternate, spec) end
    for _, bind in ipairs(exchange.bind or {}) do known_exchange(what .. ".bind", bind[1], spec) end
  end
end

local function check_queues(spec)
  for _, name in ipairs(sorted_names("queues", spec.queues)) do
    local what, queue = ("queues['%s']"):format(name), spec.queues[name]
    check(what, queue, plan.queue)
    if (queue.type == "quorum" or queue.type == "stream")
      and (queue.exclusive or queue.auto_delete or queue.durable == false) then
      bad("%s: a %s queue is durable, and neither exclusive nor auto_delete", what, queue.type)
    end
    for _, bind in ipairs(queue.bind or {}) do known_exchange(what .. ".bind", bind[1], spec) end
  end
end

local function check_batch(what, consumer)
  local batch = consumer.batch
  if not batch then return end
  check(what .. ".batch", batch, batch_options)
  if not batch.size or not batch.wait then bad("%s.batch: size and wait are both needed", what) end
  if not consumer.handler then bad("%s: batch goes with a handler, not with a route", what) end
  if consumer.order_by then bad("%s: batch and order_by exclude each other", what) end
  if consumer.prefetch and consumer.prefetch < batch.size then
    bad("%s: a batch of %d never fills with a prefetch of %d", what, batch.size, consumer.prefetch)
  end
end

local function check_flow(what, consumer)
  check_batch(what, consumer)
  if type(consumer.rate) == "table" then
    check(what .. ".rate", consumer.rate, rate_options)
    if not consumer.rate.limit then bad("%s.rate: the limit is missing: messages a second", what) end
  end
  if consumer.breaker then
    check(what .. ".breaker", consumer.breaker, breaker_options)
    if not consumer.breaker.failures then bad("%s.breaker: failures is missing: how many", what) end
  end
end

local function check_partitions(what, spec, consumer)
  local given = consumer.partitions
  if not given then return end
  local problem = partitions.problem(spec.queues[consumer.queue])
  if problem then bad("%s.partitions: %s", what, problem) end
  if type(given) ~= "table" then return end
  check(what .. ".partitions", given, partition_options)
  if not given.count then bad("%s.partitions: the count is missing", what) end
  if not given.by then return end
  check(what .. ".partitions.by", given.by, by_options)
  if (given.by.header == nil) == (given.by.property == nil) then
    bad("%s.partitions.by: one of header and property expected", what)
  end
end

local function check_dedupe(what, dedupe)
  if not dedupe then return end
  local store = dedupe.store or dedupe
  if dedupe.store then check(what .. ".dedupe", dedupe, dedupe_options) end
  for _, name in ipairs { "begin", "commit", "abort" } do
    if type(store[name]) ~= "function" then bad("%s.dedupe: the store has no function '%s'", what, name) end
  end
end

-- A table of options for a ladder, or its name; nothing is made of it yet.
local function check_ladder(what, given, app)
  if type(given) == "table" and getmetatable(given) ~= nil then return end -- one that is made
  local opts = { name = given or app }
  if type(given) == "table" then
    opts = { name = app }
    for key, value in pairs(given) do opts[key] = value end
  end
  local ok, problem = pcall(Ladder.new, opts, -1)
  if not ok then bad("%s.%s", what, problem) end
end

local function check_connect(given)
  if type(given) ~= "table" or given.consume or given.publish then return end
  local ok, problem = pcall(connection_options.check, given, -2)
  if not ok then bad("connect: %s", (problem:gsub("^connect: ", ""))) end
end

-- Where failed messages go must not be where they come from.
local function check_dead_letter(what, spec, consumer)
  local queue = consumer.dead_letter
  if queue == nil then queue = spec.name .. ".dead" end
  if queue == consumer.queue then
    bad("%s.dead_letter: a cycle: its dead letters would come back to its own queue '%s'", what, queue)
  end
end

-- ---- Routes -----------------------------------------------------------------------------------------

local function check_route(what, spec, consumer)
  local compiled, problem = compile.compile(consumer.handler or consumer.route)
  if not compiled then bad("%s.route: %s", what, problem) end
  for _, send in ipairs(compiled.sends) do
    if cycles.reaches(spec, send, consumer.queue) then
      bad("%s.route: a cycle: what route.%s (%s) sends, unchanged, comes back to this consumer's own queue '%s'", what,
        send.kind, send.where, consumer.queue)
    end
  end
  return compiled
end

-- ---- Consumers --------------------------------------------------------------------------------------

-- Whether it commits the handlers' own transaction.
local function joins(consumer)
  local dedupe = consumer.dedupe
  return dedupe and (dedupe.store or dedupe).joined
end

local function check_consumer(what, spec, consumer)
  check(what, consumer, plan.consumer)
  if not consumer.queue or consumer.queue == "" then bad("%s: the queue is missing", what) end
  known(what, "queue", consumer.queue, spec.queues or {})
  if consumer.handler == nil and consumer.route == nil then
    bad("%s: it has neither a handler nor a route: handler = function(message) … end", what)
  end
  if consumer.handler ~= nil and consumer.route ~= nil then bad("%s: handler and route exclude each other", what) end
  local problem = consumer.route ~= nil and route.no_target(consumer.route)
  if problem then bad("%s.route: %s", what, problem) end
  check_flow(what, consumer)
  check_partitions(what, spec, consumer)
  check_dedupe(what, consumer.dedupe)
  if consumer.ladder ~= nil then check_ladder(what, consumer.ladder, spec.name) end
  check_dead_letter(what, spec, consumer)
  if consumer.batch and joins(consumer) then
    bad("%s: batch and a de-duplication store in a transaction of your own exclude each other", what)
  end
end

local function kind_of(queue)
  return queue.type or queue.arguments and queue.arguments["x-queue-type"] or "classic"
end

-- A copy would come back to every reader of a stream, and might find an exclusive queue gone.
local function keep_in_process(compiled)
  local stream = compiled.kind == "stream"
  if stream or compiled.exclusive then compiled.in_process = true end
  if stream then compiled.hold = compiled.hold or math.huge end -- nothing goes back to a stream
end

local function compile_consumer(what, spec, given)
  check_consumer(what, spec, given)
  local queue = spec.queues[given.queue]
  local compiled = {}
  for key, value in pairs(given) do compiled[key] = value end
  compiled.app, compiled.trace = spec.name, spec.trace ~= false
  compiled.kind = kind_of(queue)
  compiled.exclusive = queue.exclusive or false
  keep_in_process(compiled)
  compiled.concurrency = given.concurrency or joins(given) and 1 or 16
  compiled.prefetch = given.prefetch
    or math.min(65535, math.max(64, 4 * compiled.concurrency, given.batch and 2 * given.batch.size or 0))
  if compiled.ladder == nil then compiled.ladder = spec.ladder end
  compiled.target = check_route(what, spec, given)
  compiled.handler_at = compiled.target.constant and compiled.target.describe[compiled.target.constant]
  if type(given.partitions) == "number" then compiled.partitions = { count = given.partitions } end
  return compiled
end

local function check_cycles(spec)
  local queues = cycles.find(spec)
  if queues then
    bad("consumers: a cycle: everything goes round by way of the queues '%s'", table.concat(queues, "', '"))
  end
end

local function copy(map)
  local all = {}
  for key, value in pairs(map or {}) do all[key] = value end
  return all
end

local function compile_all(spec)
  check("the app", spec, plan.app)
  if spec.name == nil or spec.name == "" then bad("the name is missing: name = \"orders\"") end
  check_ladder("the app", spec.ladder, spec.name)
  check_connect(spec.connect)
  check_exchanges(spec)
  check_queues(spec)
  local consumers = spec.consumers
  if type(consumers) ~= "table" or next(consumers) == nil then
    bad("there are no consumers: consumers = { { queue = …, handler = … } }")
  end
  local count = 0
  for _ in pairs(consumers) do count = count + 1 end
  local compiled = {}
  for i = 1, count do
    if consumers[i] == nil then bad("consumers must be a list, and entry %d is missing", i) end
    compiled[i] = compile_consumer(("consumers[%d]"):format(i), spec, consumers[i])
  end
  check_cycles(spec)
  local made = {
    name = spec.name, exchanges = copy(spec.exchanges), queues = copy(spec.queues), consumers = {},
    ladder = spec.ladder, trace = spec.trace ~= false,
  }
  for _, consumer in ipairs(compiled) do
    local parts = consumer.partitions and partitions.expand(made, consumer) or { consumer }
    for _, part in ipairs(parts) do made.consumers[#made.consumers + 1] = part end
  end
  return made
end

--- Checks an app and compiles its consumers; nil and what is wrong with it.
---@param spec moonrabbit.AppOptions
---@return table|nil plan, string? problem
function plan.compile(spec)
  local ok, result = pcall(compile_all, spec)
  if ok then return result end
  if getmetatable(result) == Mistake then return nil, result[1] end
  error(result, 0)
end

return plan
