--- moonrabbit dlq replay, moonrabbit dlq purge

local connect = require "moonrabbit.cli.connect"
local exit = require "moonrabbit.cli.exit"
local filters = require "moonrabbit.cli.dlq.filters"
local output = require "moonrabbit.cli.output"
local progress = require "moonrabbit.cli.progress"
local walk = require "moonrabbit.cli.dlq.walk"

local replay = {}

-- Errors after which the next message would fare no better.
local fatal = { nacked = true, timeout = true, blocked = true, closed = true }

-- The channel that publishes: a new one when the broker has closed the last.
local function publisher(conn, state)
  if not state.channel or not state.channel:is_open() then
    local channel, err = conn:channel { confirm = true }
    if not channel then return nil, err end
    state.channel = channel
  end
  return state.channel
end

local function destination(args, letter)
  if args.to then return "", args.to end
  return require "moonrabbit.app.dead_letter".destination(letter, args.republish)
end

local function fail(state, err)
  state.failed = state.failed + 1
  local text = tostring(err)
  state.reasons[text] = (state.reasons[text] or 0) + 1
end

-- Sends one on its way and acks it: nothing is acked before the broker has the copy.
local function send(conn, args, state, msg, letter)
  local exchange, key = destination(args, letter)
  if not exchange then return nil, "it does not tell where it came from: --to QUEUE says where it goes" end
  if args.dry_run then return true end
  local channel, err = publisher(conn, state)
  if not channel then return nil, err end
  local ok, problem = require "moonrabbit.app.dead_letter".replay(msg, letter, {
    channel = channel, exchange = exchange, routing_key = key, republish = args.republish, timeout = conn.call_timeout,
  })
  if not ok then return nil, problem end
  local acked, why = msg:ack()
  if not acked then return nil, ("replayed, but still there, for it could not be acked: %s"):format(tostring(why)) end
  return true
end

local function complain_about(state, what)
  local list = {}
  for text, count in pairs(state.reasons) do list[#list + 1] = { text = text, count = count } end
  table.sort(list, function(a, b) return a.count > b.count or (a.count == b.count and a.text < b.text) end)
  for _, each in ipairs(list) do output.complain(("%d %s: %s"):format(each.count, what, each.text)) end
end

local function report(args, state, result, verb)
  local left = result.total - state.done
  if args.dry_run then left = result.total end
  complain_about(state, "not " .. verb)
  output.result({
    queue = args.queue, [verb] = state.done, failed = state.failed, matched = result.matched, looked_at = result.seen,
    left = left, dry_run = args.dry_run or false,
  }, ("%d%s %s, %d failed, %d left in %s"):format(state.done, args.dry_run and " would be" or "", verb, state.failed,
    left, args.queue))
  if result.stopped then return result.stopped end
  return state.failed > 0 and exit.failed or exit.ok
end

-- Goes through the queue with act(msg, letter) -> true | nil, err.
local function each(ch, args, verb, act)
  local state = { done = 0, failed = 0, reasons = {} }
  local bar
  local result, err = walk.run(ch, args, function(msg, letter, self)
    local ok, problem = act(state, msg, letter)
    if ok then
      state.done = state.done + 1
    else
      fail(state, problem)
      if type(problem) == "table" and fatal[problem.kind] then self.stopped = self.stopped or exit.failed end
    end
    bar:update(state.done + state.failed)
  end, { started = function(self)
    bar = progress.new(verb, not filters.any(args) and math.min(self.total, self.limit) or nil, connect.now)
  end })
  if bar then bar:finish() end
  if not result then
    complain_about(state, "not " .. verb)
    return nil, err
  end
  return report(args, state, result, verb)
end

--- dlq replay
function replay.replay(ch, args, conn)
  return each(ch, args, "replayed", function(state, msg, letter) return send(conn, args, state, msg, letter) end)
end

--- dlq purge: all at once where nothing is to be chosen.
function replay.purge(ch, args)
  if not filters.any(args) and not args.limit and not args.dry_run then
    local count, err = ch:queue_purge(args.queue)
    if not count then return nil, err end
    return report(args, { done = count, failed = 0, reasons = {} }, { total = count, matched = count, seen = count },
      "purged")
  end
  return each(ch, args, "purged", function(_, msg)
    if args.dry_run then return true end
    return msg:ack()
  end)
end

return replay
