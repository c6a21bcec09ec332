--- Goes through a queue of dead letters once, and gives back what is not settled at the end.
--
-- Messages are taken one by one (basic.get), several requests at a time, and at most as many as the queue held at the
-- start: what comes meanwhile, a replayed message that failed again for instance, is left for the next time. What does
-- not fit the filters stays unacked until the end, so that it is seen once.

local connect = require "moonrabbit.cli.connect"
local filters = require "moonrabbit.cli.dlq.filters"

local walk = {}

-- How many requests are under way at once.
local WORKERS = 16

local Walk = {}
Walk.__index = Walk

local function is_over(self)
  return self.stopped or self.problem or self.taken >= self.total or self.matched >= self.limit
end

-- Waits until the rate allows one more, or it is over.
local function pace(self)
  local rate = self.args.rate
  if not rate then return end
  local now = connect.now()
  local at = math.max(now, self.next_at or now)
  self.next_at = at + 1 / rate
  while now < at and not is_over(self) do
    self.wake:wait(at - now)
    now = connect.now()
  end
end

-- One message: whether there was one.
local function step(self)
  pace(self)
  if is_over(self) then return false end
  self.taken = self.taken + 1
  local msg, err = self.ch:get(self.args.queue)
  if not msg then
    if err then self.problem = self.problem or err end
    return false
  end
  self.seen = self.seen + 1
  local letter = require "moonrabbit.app.dead_letter".read(msg)
  if self.matched < self.limit and filters.match(self.args, msg, letter, os.time()) then
    self.matched = self.matched + 1
    self.visit(msg, letter, self)
  end
  return true
end

local function worker(self)
  local ok, err = require "moonrabbit.protect"(function()
    while not is_over(self) do
      if not step(self) then break end
    end
  end)
  if not ok then self.thrown = self.thrown or err end
  self.running = self.running - 1
  self.ended:signal()
  if is_over(self) then self.wake:broadcast() end
end

local function run_workers(self, count)
  local native = require "moonrabbit.runtime.native"
  self.ended, self.wake, self.running = native.condition(), native.condition(), count
  for _ = 1, count do native.spawn(worker, self) end
  while self.running > 0 do self.ended:wait() end
  if self.thrown then error(self.thrown, 0) end
end

--- Calls visit(msg, letter, walk) for each dead letter that args ask for; it settles the message, or leaves it. Returns
-- { seen, matched, total, stopped }, or nil, err. options: workers (16), limit (args.limit).
function walk.run(ch, args, visit, options)
  options = options or {}
  local info, err = ch:queue_declare(args.queue, { passive = true })
  if not info then return nil, err end
  local self = setmetatable({
    ch = ch, args = args, visit = visit, total = info.message_count, limit = options.limit or args.limit or math.huge,
    taken = 0, seen = 0, matched = 0,
  }, Walk)
  if options.started then options.started(self) end
  local unwatch = connect.on_stop(function(code)
    self.stopped = code
    if self.wake then self.wake:broadcast() end
  end)
  run_workers(self, options.workers or WORKERS)
  unwatch()
  if ch:is_open() and ch:unsettled() > 0 then ch:nack(0, { multiple = true, requeue = true }) end
  if self.problem then return nil, self.problem end
  return self
end

return walk
