--- Calls that wait for the broker's answer. It answers in order, so each channel has such a queue.
-- @module moonrabbit.session.calls

---@class moonrabbit.Call
---@field what string            the method that was sent
---@field condition table        signalled when the answer has come
---@field late function?         called with an answer that comes when the caller has given up
---@field abandoned boolean?     nobody takes the answer any more
---@field done boolean
---@field ok boolean?            when it is done: whether `result` is an answer, else an error
---@field result any
---@field extra any

---@class moonrabbit.Calls
local Calls = {}
Calls.__index = Calls

function Calls.new()
  return setmetatable({ first = 1, last = 0 }, Calls)
end

---@param call moonrabbit.Call
function Calls:push(call)
  self.last = self.last + 1
  self[self.last] = call
end

local function extract(self, what)
  for i = self.first + 1, self.last do
    local call = self[i]
    if call.what == what then
      for j = i, self.last do self[j] = self[j + 1] end
      self.last = self.last - 1
      return call
    end
  end
end

--- The oldest call, or the oldest of a method. The broker answers in order, but for basic.consume,
--- whose answer comes from the queue and may be overtaken.
---@param what string?
---@return moonrabbit.Call?
function Calls:pop(what)
  local first = self.first
  if what and self[first] and self[first].what ~= what then return extract(self, what) end
  local call = self[first]
  if call then
    self[first] = nil
    if first == self.last then
      self.first, self.last = 1, 0
    else
      self.first = first + 1
    end
  end
  return call
end

--- Ends a call. One that nobody waits for any more may want to undo what it did.
---@param call moonrabbit.Call
function Calls.resolve(call, ok, result, extra)
  call.done = true
  if call.abandoned then
    if ok and call.late then call.late(result, extra) end
    return
  end
  call.ok, call.result, call.extra = ok, result, extra
  call.condition:signal()
end

--- All of them fail.
function Calls:fail(err)
  local call = self:pop()
  while call do
    Calls.resolve(call, false, err)
    call = self:pop()
  end
end

return Calls
