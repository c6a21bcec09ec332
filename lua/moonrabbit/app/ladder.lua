--- The ladder: wait queues in the broker, one for each delay, that all retries of an app share.
--
-- A step of 5 s of the ladder `orders` is a fanout exchange and a queue, both `orders.wait.5s`. The queue has a
-- `x-message-ttl`, and its dead letters go to the direct exchange `orders.home` under their own routing key. So a
-- message that is published to the step's exchange with a consumer queue's name as its key comes back to that queue
-- 5 s later, since every consumer queue is bound to `orders.home` by its own name: a fanout exchange does not look at
-- the key, and keeps it. What has no home any more, because its queue was deleted, goes to the queue `orders.orphans`, by
-- the alternate exchange of `orders.home`.
--
-- Steps are at most 10 % apart, from 0.1 s to 46 days; a delay takes the next longer one, so no message is early and
-- none later than one step. They are declared when first used, and never go away by themselves. How many there are does
-- not depend on the policies: 33 for a factor of ten.
--
-- Wait queues are quorum queues with at-least-once dead-lettering where the broker can (3.10 and later): a home that
-- is full (`reject-publish`) then keeps its messages waiting, and no node takes them along when it dies. On older
-- brokers they are classic queues, and the log says so.
--
-- With `mode = "existing"` nothing is declared: for users without the permission. `ladder:entities` says what must be
-- there.
-- @module moonrabbit.app.ladder

local errors = require "moonrabbit.errors"
local options = require "moonrabbit.options"
local own_channel = require "moonrabbit.app.own_channel"
local steps = require "moonrabbit.app.steps"

local ladder = {}

---@class moonrabbit.Ladder
---@field name string
---@field mode "declare"|"existing"
local Ladder = {}
Ladder.__index = Ladder
Ladder.__name = "moonrabbit.Ladder"

-- Seconds for which a step that could not be declared is not tried again.
local BROKEN_FOR = 30

local function name_of_ladder(value)
  local expected = options.shortstr(value)
  if expected then return expected end
  if value == "" or #value > 200 then return "a name of 1 to 200 bytes" end
end

local function step_list(value)
  if not options.is_list(value) or #value == 0 then return "a list of delays" end
  for i, seconds in ipairs(value) do
    if type(seconds) ~= "number" or not (seconds > 0 and seconds <= steps.LONGEST) then
      return "a list of delays, each more than 0 s"
    end
    if i > 1 and seconds <= value[i - 1] then return "a list of delays, the shortest first" end
  end
end

local ladder_options = {
  name = name_of_ladder, mode = options.one_of("declare", "existing"), steps = step_list, log = options.callback,
  now = options.callback,
}

---@class moonrabbit.LadderOptions
---@field name string
---@field mode ("declare"|"existing")?  "declare" by default
---@field steps number[]?  the delays it has, in seconds, instead of those made by itself; the shortest first
---@field log fun(level: string, text: string)?
---@field now (fun(): number)?          seconds, monotonic

--- A ladder. Nothing is declared yet.
---@param opts moonrabbit.LadderOptions|string a string is its name
---@param level integer? as in error(), for mistakes; 2 by default
---@return moonrabbit.Ladder
function ladder.new(opts, level)
  if type(opts) == "string" then opts = { name = opts } end
  opts = options.check("ladder", opts, ladder_options, level)
  if not opts.name then error("ladder: option 'name' is missing", level or 2) end
  return setmetatable({
    name = opts.name, mode = opts.mode or "declare", steps = opts.steps,
    home = opts.name .. ".home", orphans = opts.name .. ".orphans",
    _log = opts.log or function() end, _now = opts.now or os.time,
    _ready = {},   -- step in ms -> its name, once it is there
    _broken = {},  -- step in ms -> { err, until }
    _waiting = {}, -- step in ms -> condition of those who wait for its declaration
  }, Ladder)
end

-- ---- Names ------------------------------------------------------------------------------------------

--- The step that a delay takes: milliseconds, never less than the delay. nil, err when no step is that long.
---@param delay number seconds
---@return integer|nil milliseconds, moonrabbit.Error?
function Ladder:step(delay)
  local found
  if self.steps then found = steps.of_list(self.steps, delay) else found = steps.of(delay) end
  if found then return found end
  return nil, errors.new { kind = "overflow", temporary = false,
    message = ("the ladder '%s' has no step as long as %g s"):format(self.name, delay) }
end

--- The name of a step's exchange and queue.
---@param step integer milliseconds
---@return string
function Ladder:wait_name(step)
  return ("%s.wait.%s"):format(self.name, steps.text(step))
end

-- ---- What it consists of ----------------------------------------------------------------------------

-- Whether a broker has quorum queues that dead-letter at least once.
local function has_at_least_once(version)
  local major, minor = tostring(version or ""):match "^(%d+)%.(%d+)"
  major, minor = tonumber(major), tonumber(minor)
  return major ~= nil and (major > 3 or (major == 3 and minor >= 10))
end

local function has_no_limit(version)
  return (tonumber(tostring(version or ""):match "^(%d+)%.") or 0) >= 4
end

--- Arguments of a quorum queue that keeps messages however often somebody looks at them: from 4.0 the
--- broker would drop them after twenty looks.
---@package
function ladder.parking_arguments(version)
  return { ["x-queue-type"] = "quorum", ["x-delivery-limit"] = has_no_limit(version) and -1 or nil }
end

local function wait_arguments(self, step, quorum)
  local arguments = { ["x-message-ttl"] = step, ["x-dead-letter-exchange"] = self.home }
  if quorum then
    arguments["x-queue-type"] = "quorum"
    arguments["x-dead-letter-strategy"] = "at-least-once"
    arguments["x-overflow"] = "reject-publish"
  end
  return arguments
end

local function step_entities(self, step, quorum)
  local name = self:wait_name(step)
  return {
    exchanges = { { name = name, type = "fanout", durable = true } },
    queues = { { name = name, durable = true, arguments = wait_arguments(self, step, quorum) } },
    bindings = { { queue = name, exchange = name, routing_key = "" } },
  }
end

local function base_entities(self, version)
  return {
    exchanges = {
      { name = self.orphans, type = "fanout", durable = true },
      { name = self.home, type = "direct", durable = true, arguments = { ["alternate-exchange"] = self.orphans } },
    },
    queues = { { name = self.orphans, durable = true, arguments = ladder.parking_arguments(version) } },
    bindings = { { queue = self.orphans, exchange = self.orphans, routing_key = "" } },
  }
end

local function append(to, from)
  for _, kind in ipairs { "exchanges", "queues", "bindings" } do
    for _, entity in ipairs(from[kind]) do to[kind][#to[kind] + 1] = entity end
  end
end

---@class moonrabbit.LadderEntities
---@field exchanges table[]  { name, type, durable, arguments }
---@field queues table[]     { name, durable, arguments }
---@field bindings table[]   { queue, exchange, routing_key }

--- Everything that the ladder needs for consumer queues and delays: for plans, and for a ladder that exists.
---@param queues string[]    the consumer queues
---@param delays number[]    seconds
---@param version string?    the broker's, as Connection:server has it; without one a new broker is supposed
---@return moonrabbit.LadderEntities
function Ladder:entities(queues, delays, version)
  version = version or "4.0"
  local all = base_entities(self, version)
  for _, queue in ipairs(queues) do
    all.bindings[#all.bindings + 1] = { queue = queue, exchange = self.home, routing_key = queue }
  end
  local seen = {}
  for _, delay in ipairs(delays) do
    local step = self:step(delay)
    if step and not seen[step] then
      seen[step] = true
      append(all, step_entities(self, step, has_at_least_once(version)))
    end
  end
  return all
end

-- ---- Declaring --------------------------------------------------------------------------------------

-- Declares entities, each on a channel that an error may close. `passive`: only looks whether they are there.
local function declare(channel, entities, passive)
  local ok, err
  for _, x in ipairs(entities.exchanges) do
    ok, err = channel:exchange_declare(x.name, passive and { passive = true } or {
      type = x.type, durable = x.durable, arguments = x.arguments })
    if not ok then return nil, err, x.name end
  end
  for _, q in ipairs(entities.queues) do
    ok, err = channel:queue_declare(q.name, passive and { passive = true } or {
      durable = q.durable, arguments = q.arguments })
    if not ok then return nil, err, q.name end
  end
  if passive then return true end
  for _, b in ipairs(entities.bindings) do
    ok, err = channel:queue_bind(b.queue, b.exchange, b.routing_key)
    if not ok then return nil, err, b.queue end
  end
  return true
end

local hints = {
  [403] = "this user may not declare it: have it declared (moonrabbit topology apply), and set mode = \"existing\"",
  [404] = "it is not there: have it declared (moonrabbit topology apply)",
  [406] = "it is there, with other properties: delete it, or name another ladder",
}

-- The broker's error, with what it means for the ladder.
local function explain(self, err, name)
  local hint = hints[err.code]
  if not hint or not name then return err end
  return errors.new { kind = err.kind, code = err.code, class = err.class, method = err.method, endpoint = err.endpoint,
    temporary = err.temporary, message = ("ladder '%s': '%s': %s: %s"):format(self.name, name, hint, err.message) }
end

local function version_of(connection)
  local server = connection:server()
  return server and server.version
end

--- Declares `home` and `orphans` and binds consumer queues to `home`; in the mode "existing" it only looks.
---@param connection moonrabbit.Connection
---@param queues string[]
---@return true|nil, moonrabbit.Error?
function Ladder:setup(connection, queues)
  local entities = self:entities(queues, {}, version_of(connection))
  local ok, err, name = own_channel(connection, declare, entities, self.mode == "existing")
  -- The queue of orphans may be an older broker's, or the user's own.
  if not ok and err.code == 406 and name == self.orphans then
    entities.queues = {}
    ok, err, name = own_channel(connection, declare, entities)
  end
  if ok then return true end
  return nil, explain(self, err, name)
end

-- A quorum queue; a classic one where the broker has no better, or where this ladder was begun with one.
local function declare_step(self, connection, step)
  local existing = self.mode == "existing"
  local quorum = has_at_least_once(version_of(connection))
  local ok, err, name = own_channel(connection, declare, step_entities(self, step, quorum), existing)
  if not ok and err.code == 406 and quorum and name == self:wait_name(step) then
    quorum = false
    local second = own_channel(connection, declare, step_entities(self, step, false), existing)
    if second then ok = true end
  end
  if not ok then return nil, explain(self, err, name) end
  if not quorum and not existing and not self._told then
    self._told = true
    self._log("warn", ("ladder '%s': its wait queues are classic queues, which dead-letter at most once: a home queue "
      .. "that is full loses what comes back to it"):format(self.name))
  end
  return self:wait_name(step)
end

-- Declares a step that nobody declares at the moment, and wakes those who wait for it.
local function make_step(self, connection, step)
  local condition = connection._runtime.condition()
  self._waiting[step] = condition
  local name, err = declare_step(self, connection, step)
  self._waiting[step] = nil
  if name then
    self._ready[step], self._broken[step] = name, nil
  elseif not err.temporary then
    self._broken[step] = { err = err, till = self._now() + BROKEN_FOR }
  end
  condition:broadcast()
  return name, err
end

--- The exchange of a step, declared when it is first used.
---@param connection moonrabbit.Connection
---@param step integer milliseconds, as Ladder:step gives it
---@return string|nil exchange, moonrabbit.Error?
function Ladder:exchange(connection, step)
  local condition = self._waiting[step]
  if condition then condition:wait(connection.call_timeout) end
  local err = self:broken(step)
  if err then return nil, err end
  if self._ready[step] then return self._ready[step] end
  return make_step(self, connection, step)
end

--- Why a step cannot be used, as far as was found out lately; nil: nothing is known against it.
---@param step integer
---@return moonrabbit.Error?
function Ladder:broken(step)
  local broken = self._broken[step]
  if not broken then return nil end
  if self._now() < broken.till then return broken.err end
  self._broken[step] = nil
end

--- The steps that this process has used and not forgotten: milliseconds -> name of exchange and queue.
---@return table<integer, string>
function Ladder:used() return self._ready end

--- Forgets that a step is there: the next use declares it again.
---@param step integer
function Ladder:forget(step)
  self._ready[step] = nil
end

--- What is wrong with the ladder's queues, as the management API lists them: stuck steps, policies that change them,
--- orphans. See moonrabbit.app.ladder_check.
---@param queues table[]     as Management:queues answers
---@param consumed string[]? the queues that messages come home to: their delivery limits are looked at
---@return moonrabbit.LadderProblem[] problems
function Ladder:check(queues, consumed)
  local problems = require("moonrabbit.app.ladder_check").run(self, queues, consumed)
  return problems
end

return ladder
