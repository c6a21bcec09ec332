--- Ladders as metrics: how many messages wait on each step, how many cannot go home, and orphans.
--
-- A task looks every `interval` seconds, and the page shows what it saw last. With the management API it sees all the
-- steps, and on quorum steps the messages whose wait is over and that are stuck. Without, it asks by passive declares for
-- the steps that policies name or this process has used; they do not count what is stuck, so there is no such series.
-- A step that is gone leaves the page. So do all of a ladder that cannot be looked at, and `moonrabbit_ladder_known` is 0.
-- @module moonrabbit.metrics.ladders

local options = require "moonrabbit.options"
local protect = require "moonrabbit.protect"

local ladders = {}

local INTERVAL = 30

---@class moonrabbit.LadderWatchOptions
---@field management moonrabbit.Management?  without one, passive declares on the app's connection
---@field interval number?  seconds between two looks; 30 by default
---@field log fun(level: string, text: string)?  hears when a look fails; the app's by default

ladders.options = {
  management = options.table, interval = options.number(0.01), log = options.callback,
}

local function step_of(ladder, queue)
  local prefix = ladder .. ".wait."
  if queue:sub(1, #prefix) == prefix then return queue:sub(#prefix + 1) end
end

-- ---- Looking ----------------------------------------------------------------------------------------
-- What a look sees: { steps = { ["5s"] = { waiting, stuck } }, orphans }

local columns = { "name", "messages", "messages_ready", "messages_dlx" }

local function ask_management(self, ladder)
  local list, err = self.management:queues { vhost = self.vhost, name = ladder .. ".", columns = columns }
  if not list then return nil, err end
  local seen = { steps = {} }
  for _, queue in ipairs(list) do
    local name = tostring(queue.name)
    local step = step_of(ladder, name)
    if step then
      seen.steps[step] = { waiting = tonumber(queue.messages_ready), stuck = tonumber(queue.messages_dlx) or 0 }
    elseif name == ladder .. ".orphans" then
      seen.orphans = tonumber(queue.messages)
    end
  end
  return seen
end

-- The queues to ask for: name -> the ladder that has used it, or true. One that was not there is asked for again only
-- once it was used: the broker logs each such question. What was seen or used once is looked at on: a script that was
-- loaded again has used no step yet.
local function candidates(self, ladder)
  local names = {}
  for _, name in ipairs(self.planned[ladder]) do
    if not self.absent[name] then names[name] = true end
  end
  for name in pairs(self.seen[ladder]) do names[name] = true end
  for _, each in ipairs(self.ladders[ladder]) do
    for step in pairs(each:used()) do names[each:wait_name(step)] = each end
  end
  return names
end

local function not_there(self, ladder, name, owner)
  self.absent[name], self.seen[ladder][name] = true, nil
  if owner == true then return end
  for step in pairs(owner:used()) do
    if owner:wait_name(step) == name then owner:forget(step) end -- its next use declares it again
  end
end

local function ask_broker(self, ladder)
  local connection = self.connection
  local seen, channel = { steps = {} }, nil
  for name, owner in pairs(candidates(self, ladder)) do
    if not channel or not channel:is_open() then
      local opened, why = connection:channel()
      if not opened then return nil, why end
      channel = opened
    end
    local found, err = channel:queue_declare(name, { passive = true })
    if found then
      self.seen[ladder][name] = true
      local step = step_of(ladder, name)
      if step then seen.steps[step] = { waiting = found.message_count } else seen.orphans = found.message_count end
    elseif err.code == 404 then
      not_there(self, ladder, name, owner)
    else
      if channel:is_open() then channel:close() end
      return nil, err
    end
  end
  if channel and channel:is_open() then channel:close() end
  return seen
end

-- ---- Showing ----------------------------------------------------------------------------------------

local function set_or_remove(family, value, ...)
  if value then family:with(...):set(value) else family:remove(...) end
end

-- `seen` nil: nothing is known.
local function show(self, ladder, seen)
  local families, before = self.families, self.shown[ladder]
  local now = seen and seen.steps or {}
  for step in pairs(before) do
    if not now[step] then
      families.ladder_waiting:remove(ladder, step)
      families.ladder_stuck:remove(ladder, step)
    end
  end
  for step, counts in pairs(now) do
    set_or_remove(families.ladder_waiting, counts.waiting, ladder, step)
    set_or_remove(families.ladder_stuck, counts.stuck, ladder, step)
  end
  set_or_remove(families.ladder_orphans, seen and seen.orphans, ladder)
  families.ladder_known:with(ladder):set(seen and 1 or 0)
  self.shown[ladder] = now
end

local function look(self, ladder)
  local ask = self.management and ask_management or ask_broker
  local whole, seen, err = protect(ask, self, ladder)
  if not whole then
    if seen == self.runtime.cancelled and seen ~= nil then error(seen, 0) end
    seen, err = nil, seen
  end
  if self.closed then return end
  if not seen and not self.told[ladder] then
    self.log("warn", ("the ladder '%s' cannot be looked at: %s"):format(ladder, tostring(err)))
  end
  self.told[ladder] = not seen
  show(self, ladder, seen)
end

local function run(self)
  while not self.closed do
    for ladder in pairs(self.ladders) do look(self, ladder) end
    if not self.closed then self.wake:wait(self.interval) end
  end
end

-- ---- Watching ---------------------------------------------------------------------------------------

-- Ladder names -> the runners' ladders of that name, but for consumers whose retries are all waited for here.
local function ladders_of(app)
  local found = {}
  for _, runner in ipairs(app.runners) do
    local disposal = runner.disposal
    local ladder = disposal and disposal.ladder
    if ladder and disposal.threshold < math.huge then
      local list = found[ladder.name] or {}
      list[#list + 1] = ladder
      found[ladder.name] = list
    end
  end
  return found
end

-- The queues that the app's policies may need, by ladder.
local function planned(app, names)
  local found = {}
  for ladder in pairs(names) do found[ladder] = { ladder .. ".orphans" } end
  for _, step in ipairs(require("moonrabbit.life.explain").topology(app)) do
    for ladder, list in pairs(found) do
      if step[1] == "queue" and step_of(ladder, step[2]) then list[#list + 1] = step[2] end
    end
  end
  return found
end

--- See Metrics:watch_ladders. `seen`: the queues that were found, by ladder; kept from one watch to the next.
---@package
function ladders.watch(families, app, opts, seen)
  local connection = app._consuming
  local self = {
    families = families, connection = connection, vhost = connection._target and connection._target.vhost,
    runtime = connection._runtime, management = opts.management, interval = opts.interval or INTERVAL,
    log = opts.log or app._log or function() end, ladders = ladders_of(app), shown = {}, told = {}, absent = {},
    wake = connection._runtime.condition(), closed = false, seen = seen,
  }
  self.planned = planned(app, self.ladders)
  for ladder in pairs(self.ladders) do self.shown[ladder], seen[ladder] = {}, seen[ladder] or {} end
  if next(self.ladders) then self.runtime.spawn(run, self) end
  return function()
    if self.closed then return end
    self.closed = true
    self.wake:broadcast()
    for ladder, list in pairs(self.ladders) do
      for _, each in ipairs(list) do
        for step in pairs(each:used()) do seen[ladder][each:wait_name(step)] = true end
      end
      show(self, ladder, nil)
      families.ladder_known:remove(ladder)
    end
  end
end

return ladders
