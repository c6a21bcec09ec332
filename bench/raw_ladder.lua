--- Delays without any Lua: messages published and taken by a program in C (peers/ladder.c), for a comparison in the same
--- run. On the wait queues of a ladder they show what the client and the app layer add; on bare queues with a TTL, what
--- the broker and the machine do to any delay.
local raw_ladder = {}

local here = arg[0]:match "^(.*)/[^/]*$" or "."
local program = here .. "/../build/bench/ladder"

local RawLadder = {}
RawLadder.__index = RawLadder

--- Whether there is the program.
function raw_ladder.there()
  return os.execute(("make -s -C '%s' ../build/bench/ladder > /dev/null 2>&1"):format(here)) == true
end

local function new(channel, queue, fields)
  fields.channel, fields.queue = channel, queue
  assert(channel:queue_delete(queue))
  assert(channel:queue_declare(queue, { durable = true }))
  return setmetatable(fields, RawLadder)
end

--- One on the wait queues that a ladder has already.
---@param channel moonrabbit.Channel
---@param queue string where the messages come home
---@param ladder moonrabbit.Ladder
function raw_ladder.on(channel, queue, ladder)
  local self = new(channel, queue, {
    own = {}, line = function(step) return ("%s %s %d"):format(ladder:wait_name(step), queue, step) end,
  })
  assert(channel:queue_bind(queue, ladder.home, queue))
  return self
end

--- One on classic queues of its own, and nothing else.
---@param channel moonrabbit.Channel
---@param queue string where the messages come home
---@param steps table<number, any> set of milliseconds
function raw_ladder.bare(channel, queue, steps)
  local function name(step) return ("%s.%d"):format(queue, step) end
  local self = new(channel, queue, {
    own = {}, line = function(step) return ("- %s %d"):format(name(step), step) end,
  })
  for step in pairs(steps) do
    self.own[#self.own + 1] = name(step)
    assert(channel:queue_delete(name(step)))
    assert(channel:queue_declare(name(step), { durable = true, arguments = {
      ["x-message-ttl"] = step, ["x-dead-letter-exchange"] = "", ["x-dead-letter-routing-key"] = queue } }))
  end
  return self
end

--- Publishes a message for each delay of a list of steps, and takes them as they come.
---@param url string
---@param list number[] milliseconds
---@param patience number seconds without a message after which it gives up
function RawLadder:start(url, list, patience)
  self.file = os.tmpname()
  local file = assert(io.open(self.file, "w"))
  for _, step in ipairs(list) do file:write(self.line(step), "\n") end
  file:close()
  self.pipe = assert(io.popen(("exec '%s' '%s' '%s' %d < '%s'"):format(program, url, self.queue, patience, self.file)))
end

--- Waits until it is done, and takes its queues away: a list of { at = when it came home, over = seconds later than its
--- step }.
function RawLadder:finish()
  local list = {}
  for line in self.pipe:lines() do
    local at, over = line:match "^(%S+) (%S+)$"
    list[#list + 1] = { at = tonumber(at), over = tonumber(over) }
  end
  self.pipe:close()
  os.remove(self.file)
  assert(self.channel:queue_delete(self.queue))
  for _, name in ipairs(self.own) do assert(self.channel:queue_delete(name)) end
  return list
end

return raw_ladder
