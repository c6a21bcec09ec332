--- Asking a loop's own resolver. Whoever asks waits as for anything else, and may be cancelled or run out of time; a
--- late answer meets nobody.
-- @module moonrabbit.runtime.shared.names

local net = require "moonrabbit.net"

-- What a task waits for that has asked.
local Question = {}
Question.__index = Question

function Question:forget() self.given_up = true end

-- Texts such as "127.0.0.1", as addresses of ours.
local function addresses_of(texts, port)
  local list = {}
  for _, text in ipairs(texts) do
    local resolver = net.resolve(text, port)
    local addresses = resolver and resolver:result()
    if addresses then list[#list + 1] = addresses[1] end
  end
  if #list == 0 then return nil, "dns", "the name has no address", true end
  return list
end

local M = {}

--- A look-up (shared/open.lua) by way of `ask(name, deadline, answer)`, which calls answer(err, texts) once, later, and
--- returns a function that takes the question back; or nil, text.
---@param loop table enter, park, ready, cancelled
---@param ask fun(name: string, deadline: number?, answer: function): function?, string?
function M.of(loop, ask)
  return function(name, port, deadline)
    local task, question = loop.enter(), setmetatable({}, Question)
    local take_back, text = ask(name, deadline, function(err, texts)
      question.err, question.texts = err, texts
      if not question.given_up then loop.ready(task, true) end
    end)
    if not take_back then return nil, "dns", text, true end
    task.on = question
    local answered, given_up = loop.park(task, deadline, true)
    if not answered then take_back() end
    if given_up then error(loop.cancelled, 0) end
    if not answered then return nil, "timeout", "no answer of the resolver in time", true end
    if question.err then return nil, "dns", question.err, true end
    return addresses_of(question.texts, port)
  end
end

return M
