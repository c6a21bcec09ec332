--- What a worker publishes: a bounded queue that every phase may put messages into, and the timer that
-- sends them.
--
-- The queue is a ring: from `head` to `next` is what was sent and is not settled yet, from `next` to `tail`
-- what is to be sent. A message stays in it until the broker has confirmed it, so when a connection is lost
-- everything from `head` on is sent again on the next one, in its order; the bounds hold for both parts together.
--
-- A message that makes the broker close the channel or the connection (an unknown exchange, a forbidden one)
-- would do so again with whatever shared the channel with it. So after such an end those that were
-- under way go one at a time; the one that the broker closes upon has failed, and the others pass.
-- @module moonrabbit.resty.outbound

local core = require "moonrabbit.core"
local errors = require "moonrabbit.errors"
local life = require "moonrabbit.resty.life"
local runtime = require "moonrabbit.runtime.resty"
local semaphore = require "ngx.semaphore"
local new_table = require "table.new"

local core_acked, core_outcome, core_take_acked = core.acked, core.outcome, core.take_acked
local now, huge = runtime.now, math.huge

---@class moonrabbit.resty.Outbound
local Outbound = {}
Outbound.__index = Outbound

-- Messages before the first unsettled ones that are looked at for each batch of confirms.
local SCAN = 256
-- So often all are looked at, when confirms come out of order.
local SWEEP = 0.005
-- A publish waits so long for room in the output before the sender looks around again.
local ROOM = 1
-- After so long without work a worker that leaves closes its connection.
local GRACE = 0.25
-- Seconds between two lines in the log about messages that failed with nobody waiting for them.
local LOG_EVERY = 10
-- Semaphores that are kept to be used again.
local SPARE = 256

-- As long as nginx's timers allow with some room.
local LONG = 86400

-- Waits for a semaphore for so many seconds, or for ever (math.huge).
local function wait_for(sema, seconds)
  while seconds > LONG do
    if sema:wait(LONG) then return end
    seconds = seconds - LONG
  end
  sema:wait(seconds)
end

--- config: `name`, `entries`, `bytes`, `linger`, `calls` (functions that run at once), `setup`, `connect`, `backoff`,
--- `exit_timeout`, `watch`.
---@param config table
---@return moonrabbit.resty.Outbound
function Outbound.new(config)
  local entries = config.entries
  local self = setmetatable({
    config = config, entries = entries,
    -- Index i has place i % entries + 1. Kept is the body where nobody waits, else the waiter, which has it; false where
    -- there is no message any more.
    kept = new_table(entries, 0), routes = new_table(entries, 0), confirmations = new_table(entries, 0),
    head = 1, next = 1, tail = 1, bytes = 0, in_flight = 0,
    sent_to = 1,           -- those below it were sent at least once
    sending = 0,           -- the one that waits for room in the output
    suspects = 1,          -- those below it go one at a time
    wake = semaphore.new(), spare = {},
    sleeping = nil,        -- what the sender may be woken by: "any" message, or an "urgent" one
    urgent = false,        -- somebody waits for a message that is not sent yet
    jobs = {}, running = 0, -- functions for the connection
    published = 0, confirmed = 0, overflows = 0, timeouts = 0, resent = 0, failures = {},
    unheard = 0, unheard_at = -huge,
    metrics = nil, seconds = nil, -- moonrabbit.resty.metrics: who is told of changes, and of how long a confirm took
  }, Outbound)
  for slot = 1, entries do
    self.kept[slot], self.routes[slot], self.confirmations[slot] = false, false, false
  end
  self.keeper = life.keep {
    name = config.name, connect = config.connect, backoff = config.backoff, exit_timeout = config.exit_timeout,
    watch = config.watch,
    serve = function(conn, keeper) return self:serve(conn, keeper) end,
    wanted = function() return self:busy() end,
    failed = function(err) self:connecting_failed(err) end,
  }
  life.on_exit(function() self:rouse() end)
  return self
end

function Outbound:busy() return self.tail > self.head or #self.jobs > 0 or self.running > 0 end

-- Wakes the sender, whatever it waits for.
function Outbound:rouse()
  if self.sleeping then
    self.sleeping = nil
    self.wake:post(1)
  end
end

function Outbound:error(kind, message, temporary)
  return errors.new { kind = kind, message = message, temporary = temporary, endpoint = self.endpoint }
end

-- ---- Into the queue ---------------------------------------------------------------------------------

-- What is on its way into a queue that is half full is sent at once: nothing gathers any more.
local function crowded(self)
  return self.tail - self.head > self.entries / 2 or self.bytes > self.config.bytes / 2
end

-- Puts a message in; never yields. nil, err when there is no room.
local function push(self, body, route, waiter)
  local tail, size = self.tail, #body
  if tail - self.head >= self.entries or self.bytes + size > self.config.bytes then
    self.overflows = self.overflows + 1
    if self.metrics then self.metrics:touch() end
    return nil, self:error("overflow", ("the queue of this worker is full (%d messages, %d bytes of bodies)"):format(
      tail - self.head, self.bytes), size <= self.config.bytes)
  end
  if self.keeper.state == "idle" and not self.keeper:start() and life.exiting then
    return nil, self:error("shutdown", "the worker is almost gone: it sends nothing any more", true)
  end
  local slot = tail % self.entries + 1
  self.kept[slot], self.routes[slot], self.confirmations[slot] = waiter or body, route, false
  self.tail, self.bytes, self.published = tail + 1, self.bytes + size, self.published + 1
  if waiter then
    waiter.index, waiter.body = tail, body
    self.urgent = true
  end
  local sleeping = self.sleeping
  if sleeping == "any" or sleeping and (waiter or crowded(self)) then
    self.sleeping = nil
    self.wake:post(1)
  end
  if self.metrics then self.metrics:touch() end
  return true
end

-- The body of a message, and who waits for it.
local function what_is(kept)
  if type(kept) == "string" then return kept, nil end
  return kept.body, kept
end

-- The head is a message, or the tail.
local function advance(self, head)
  local entries, kept, tail = self.entries, self.kept, self.tail
  while head < tail and not kept[head % entries + 1] do head = head + 1 end
  self.head = head
  if self.next < head then self.next = head end
end

-- Takes a message out of the ring.
local function take_out(self, index)
  local kept, slot = self.kept, index % self.entries + 1
  self.bytes = self.bytes - #what_is(kept[slot])
  if self.confirmations[slot] then self.in_flight = self.in_flight - 1 end
  kept[slot], self.routes[slot], self.confirmations[slot] = false, false, false
  advance(self, self.head)
end

-- Ends a message: whoever waits for it learns how.
local function finish(self, index, ok, err)
  local _, waiter = what_is(self.kept[index % self.entries + 1])
  take_out(self, index)
  if self.metrics then self.metrics:touch() end
  if ok then
    self.confirmed = self.confirmed + 1
  else
    self.failures[err.kind] = (self.failures[err.kind] or 0) + 1
  end
  if waiter then
    waiter.done, waiter.ok, waiter.err = true, ok, err
    waiter.semaphore:post(1)
  elseif not ok then
    self:unheard_of(err)
  end
end

-- A failure that nobody waits for: in the log, but not for each of thousands.
function Outbound:unheard_of(err)
  self.unheard = self.unheard + 1
  if now() - self.unheard_at < LOG_EVERY then return end
  self.unheard_at = now()
  runtime.log("error", ("%s: messages failed with nobody waiting for them: %d; the last: %s"):format(self.config.name,
    self.unheard, tostring(err)))
  self.unheard = 0
end

--- Puts a message in and returns at once.
---@param body string
---@param route userdata of core.route
---@return true|nil, moonrabbit.Error?
function Outbound:publish_async(body, route)
  local ok, err = push(self, body, route, false)
  return ok, err
end

-- What kept the connection away, for an error.
function Outbound:away(timeout)
  local failure = self.keeper.state ~= "open" and self.keeper.failure
  if not failure then return nil end
  return self:error(failure.kind, ("there was no connection to the broker for %g s: %s"):format(timeout,
    failure.message), failure.temporary)
end

-- An error while publishing is held: the standby of two sites is consume-only until it is released.
local function held(self)
  local channel = self.channel
  local why = self.keeper.state == "open" and channel and channel:is_open() and channel._session.held
  return why and self:error("blocked", why, true) or nil
end

local function give_up(self, waiter, timeout)
  self.timeouts = self.timeouts + 1
  if self.metrics then self.metrics:touch() end
  local index = waiter.index
  if index < self.sent_to or index == self.sending then
    self.kept[index % self.entries + 1] = waiter.body
    return nil, self:error("timeout",
      ("the broker has not confirmed the message within %g s: its outcome is unknown"):format(timeout))
  end
  take_out(self, index)
  return nil, self:away(timeout) or held(self)
    or self:error("timeout", ("the message was not sent within %g s"):format(timeout))
end

-- The broker refuses us for good: waiting would not help.
function Outbound:refused()
  local failure = self.keeper.state ~= "open" and self.keeper.failure
  if failure and failure.temporary == false then return failure end
end

--- Puts a message in and waits for its outcome.
---@param body string
---@param route userdata of core.route
---@param timeout number seconds
---@return true|nil, moonrabbit.Error?
function Outbound:publish(body, route, timeout)
  local failure = self:refused() or held(self)
  if failure then return nil, failure end
  local waiter = table.remove(self.spare) or { semaphore = semaphore.new() }
  waiter.done = false
  local seconds = self.seconds
  local began = seconds and now()
  local ok, err = push(self, body, route, waiter)
  if ok then
    wait_for(waiter.semaphore, timeout)
    if not waiter.done then return give_up(self, waiter, timeout) end
    ok, err = waiter.ok, waiter.err
    if ok and seconds then seconds:observe(now() - began) end
  end
  waiter.err, waiter.body = nil, nil
  if waiter.semaphore:count() == 0 and #self.spare < SPARE then self.spare[#self.spare + 1] = waiter end
  return ok, err
end

-- ---- Out of the queue -------------------------------------------------------------------------------

-- Takes off the front what is acked and nobody waits for: mostly all there is.
local function take_front(self)
  local head, entries, routes, confirmations = self.head, self.entries, self.routes, self.confirmations
  local past, bytes = core_take_acked(confirmations, self.kept, head + 1, self.next, entries)
  past = past - 1 -- what has index i here has number i + 1 there
  if past == head then return end
  for index = head, past - 1 do
    local slot = index % entries + 1
    routes[slot], confirmations[slot] = false, false
  end
  local n = past - head
  self.bytes, self.confirmed, self.in_flight = self.bytes - bytes, self.confirmed + n, self.in_flight - n
  advance(self, past)
  if self.metrics then self.metrics:touch() end
end

-- Takes out what is settled, looking past `limit` messages that are not. Returns whether it has seen all.
local function settle(self, limit)
  take_front(self)
  local entries, confirmations = self.entries, self.confirmations
  local index, pending = self.head, 0
  while index < self.next do
    local confirmation = confirmations[index % entries + 1]
    if confirmation then
      local acked = core_acked(confirmation)
      if acked then
        finish(self, index, true)
      elseif acked == nil and core_outcome(confirmation) ~= "lost" then
        finish(self, index, nil, self.channel:_failure(confirmation))
      else
        pending = pending + 1
        if pending >= limit then return false end
      end
    end
    index = index + 1
  end
  return true
end

-- Called by the reader when the broker has settled something; must not yield.
local function noticed(self)
  life.look()
  if not settle(self, SCAN) then self.sweep_due = true end
  if self.sweep_due or self.next < self.suspects or life.exiting then self:rouse() end
end

local function sent(self, index, confirmation)
  self.confirmations[index % self.entries + 1] = confirmation
  self.in_flight = self.in_flight + 1
  self.next = index + 1
  if index >= self.sent_to then self.sent_to = index + 1 end
end

-- Sends the message at `next`, which the engine has refused, once there is room. False: the channel or connection is
-- gone. nil: not now.
local function send_slowly(self, channel)
  local index = self.next
  local slot = index % self.entries + 1
  self.sending = index
  local whole, confirmation, err = pcall(channel._publish_route, channel, self.routes[slot], what_is(self.kept[slot]),
    ROOM)
  if not whole then
    confirmation, err = nil, self:error("protocol", "the message cannot be sent: " .. tostring(confirmation), false)
  end
  if confirmation then
    sent(self, index, confirmation)
    return true
  end
  self.sending = 0
  if not whole or err.kind == "overflow" and err.temporary == false then
    finish(self, index, nil, err)
    return true
  end
  if err.kind == "overflow" or err.kind == "blocked" then return nil end
  return false
end

-- Sends what there is; false and nil as send_slowly. The engine is called here, and not by a function or a pcall, for
-- LuaJIT compiles no return into one that it has not entered since the last call into C.
local function send_all(self, channel)
  local core_channel, session, kept, routes, entries =
    channel._core, channel._session, self.kept, self.routes, self.entries
  local publish_route = core_channel.publish_route
  self.urgent = false
  while self.next < self.tail do
    local index = self.next
    if index < self.suspects and self.in_flight > 0 then return true end
    local slot = index % entries + 1
    if not kept[slot] then -- given up meanwhile
      self.next = index + 1
    else
      local confirmation, flush = publish_route(core_channel, routes[slot], (what_is(kept[slot])))
      if confirmation then
        sent(self, index, confirmation)
        -- So much is not to gather: the writer's turn.
        if flush and not session:flush(ROOM) then return nil end
        if not session.dirty then session:touch() end
      else
        local went = send_slowly(self, channel)
        if not went then return went end
      end
    end
  end
  return true
end

-- Waits to be woken, by any message.
local function sleep(self, limit)
  self.sleeping = "any"
  self.wake:wait(limit)
  self.sleeping = nil
end

-- Waits for something to do. Messages that nobody waits for may gather for `linger` seconds.
local function rest(self, channel, limit)
  if #self.jobs > 0 or not channel:is_open() then return end
  sleep(self, limit)
  local linger = self.config.linger
  if linger == 0 or self.urgent or self.sweep_due or #self.jobs > 0 or life.exiting or self.next == self.tail
    or crowded(self) or not channel:is_open() then return end
  self.sleeping = "urgent"
  self.wake:wait(math.min(linger, LONG))
  self.sleeping = nil
end

-- Whether the session is to end: the worker leaves, and nothing is left to do or no time to do it.
local function leaving(self, keeper)
  if not life.exiting then return false end
  if keeper:overdue() then return true end
  if self:busy() then
    self.idle_since = nil
    return false
  end
  self.idle_since = self.idle_since or now()
  return now() - self.idle_since >= GRACE
end

-- How long the sender may sleep.
local function patience(self, keeper)
  if self.sweep_due then return SWEEP end
  if not life.exiting then return LONG end
  return math.max(0.001, math.min(GRACE, keeper.leave_by - now()))
end

-- ---- Sessions ---------------------------------------------------------------------------------------

-- What was under way on a channel that has ended is to be sent again.
local function take_back(self, reason)
  settle(self, huge)
  local past = self.next
  local coded = reason and (reason.kind == "channel" or reason.kind == "protocol") and reason.code
  local culprit
  for index = self.head, past - 1 do
    local slot = index % self.entries + 1
    if self.confirmations[slot] then
      self.confirmations[slot] = false
      self.resent = self.resent + 1
      culprit = index
    end
  end
  if coded then
    if self.in_flight == 1 then
      self.in_flight = 0
      self.resent = self.resent - 1
      finish(self, culprit, nil, reason)
    end
    self.suspects = math.max(self.suspects, past)
  end
  self.in_flight = 0
  self.next = self.head
end

local function start_jobs(self, conn)
  local jobs = self.jobs
  if #jobs == 0 then return end
  self.jobs = {}
  for _, job in ipairs(jobs) do
    runtime.spawn(job.run, conn)
  end
end

-- Sends on one channel for as long as it lasts. Returns why it ended; nil when the worker leaves.
local function use(self, conn, channel, keeper)
  self.channel = channel
  channel._notice = function() noticed(self) end
  local off = channel:on("close", function() self:rouse() end)
  while channel:is_open() and not leaving(self, keeper) do
    if self.sweep_due then self.sweep_due = not settle(self, huge) end
    start_jobs(self, conn)
    local went = send_all(self, channel)
    if went == false then runtime.sleep(0) end -- its end is about to be told
    -- A message that there was no room for has waited; one that is held has not.
    if went == nil and held(self) then sleep(self, patience(self, keeper)) end
    if went then rest(self, channel, patience(self, keeper)) end
  end
  off()
  if channel:is_open() then return nil end
  return channel:_closed_error()
end

--- Runs in a timer of its own, for as long as the connection lasts. Returns why it ended.
function Outbound:serve(conn, keeper)
  self.endpoint = conn.endpoint
  self.idle_since = nil
  conn:on("released", function() self:rouse() end)
  if self.config.setup then
    local ok, err = self.config.setup(conn)
    if not ok and err then return err end
  end
  local reason
  repeat
    local channel, err = conn:channel { confirm = true, window = 0 }
    if not channel then return err end
    reason = use(self, conn, channel, keeper)
    take_back(self, reason)
    if reason then runtime.log("warn", self.config.name .. ": " .. tostring(reason)) end
  until not reason or not conn:is_open()
  if life.exiting and keeper:overdue() then self:abandon() end
  return reason
end

-- The worker cannot stay any longer.
function Outbound:abandon()
  local err = self:error("shutdown", "the worker has left before the broker confirmed the message", true)
  local n = 0
  for index = self.head, self.tail - 1 do
    if self.kept[index % self.entries + 1] then
      n = n + 1
      finish(self, index, nil, err)
    end
  end
  if n > 0 then
    runtime.log("error", ("%s: %d messages were not confirmed when the worker had to leave"):format(
      self.config.name, n))
  end
  self:fail_jobs(err)
end

--- An attempt to connect has failed.
function Outbound:connecting_failed(err)
  if life.exiting and self.keeper:overdue() then return self:abandon() end
  if err.temporary ~= false then return end
  -- Who waits learns at once what waiting does not help against.
  local unknown = self:error("timeout", "the connection was lost before the broker confirmed the message, whose outcome"
    .. " is unknown, and cannot be made again: " .. err.message, false)
  for index = self.head, self.tail - 1 do
    if type(self.kept[index % self.entries + 1]) == "table" then
      finish(self, index, nil, index < self.sent_to and unknown or err)
    end
  end
  self:fail_jobs(err)
end

-- ---- Functions for the connection -------------------------------------------------------------------

function Outbound:fail_jobs(err)
  local jobs = self.jobs
  self.jobs = {}
  for _, job in ipairs(jobs) do
    self.running = self.running - 1
    job.results = { n = 3, true, nil, err }
    job.done:post(1)
  end
end

--- Runs fn(conn) in the timer that the connection belongs to, and waits for what it returns. What it throws
--- is thrown here.
---@param fn fun(conn: moonrabbit.Connection): any
---@param timeout number seconds
---@return any ...
function Outbound:run(fn, timeout)
  local failure = self:refused()
  if failure then return nil, failure end
  if self.running >= self.config.calls then
    self.overflows = self.overflows + 1
    return nil, self:error("overflow", ("%d calls are under way in this worker"):format(self.running))
  end
  local job = { done = semaphore.new() }
  function job.run(conn)
    local results = { pcall(fn, conn) }
    results.n = table.maxn(results)
    self.running = self.running - 1
    job.results = results
    job.done:post(1)
  end
  self.running = self.running + 1
  self.jobs[#self.jobs + 1] = job
  self:rouse()
  if self.keeper.state == "idle" then self.keeper:start() end
  wait_for(job.done, timeout)
  local results = job.results
  if not results then
    for i = #self.jobs, 1, -1 do
      if self.jobs[i] == job then
        table.remove(self.jobs, i)
        self.running = self.running - 1
      end
    end
    return nil, self:away(timeout) or self:error("timeout", ("no answer within %g s"):format(timeout))
  end
  if not results[1] then error(results[2], 0) end
  return unpack(results, 2, results.n)
end

-- ---- What is going on -------------------------------------------------------------------------------

--- Counters since the worker began, and what there is now.
---@return table
function Outbound:stats()
  local failed = {}
  for kind, n in pairs(self.failures) do failed[kind] = n end
  local queued = 0
  for index = self.next, self.tail - 1 do
    if self.kept[index % self.entries + 1] then queued = queued + 1 end
  end
  return {
    state = self.keeper.state == "open" and "open" or "connecting", reason = self.keeper.failure,
    published = self.published, confirmed = self.confirmed, failed = failed, overflows = self.overflows,
    timeouts = self.timeouts, resent = self.resent, sessions = self.keeper.sessions,
    queued = queued, in_flight = self.in_flight, bytes = self.bytes, calls = self.running,
  }
end

return Outbound
