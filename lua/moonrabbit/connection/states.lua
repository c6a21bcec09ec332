--- The states of a connection, and every way from one to another. Nothing else changes a state.
--
-- docs/connections.md shows the diagram of this table: scripts/states-diagram draws it, and a spec fails when
-- the two differ.
-- @module moonrabbit.connection.states

local states = {}

--- Where a connection begins.
states.first = "connecting"

--- In the order in which a connection lives: from, what happened, to, and when that is.
states.transitions = {
  { "connecting", "connected", "open", "a broker took us" },
  { "connecting", "failed", "closed", "no broker did, or this side gave up" },
  { "open", "lost", "recovering", "the connection ended, and is to come back" },
  { "open", "ended", "closed", "the connection ended, with reconnect = false" },
  { "open", "close", "closing", "this side says goodbye" },
  { "recovering", "connected", "open", "a broker took us, exchanges, queues, bindings and channels are there" },
  { "recovering", "gave_up", "closed", "a permanent error, or no attempts are left" },
  { "recovering", "close", "closed", "this side closed it meanwhile" },
  { "closing", "ended", "closed", "the broker answered, or did not in time" },
}

local next_state = {}
for _, transition in ipairs(states.transitions) do
  local from, event, to = transition[1], transition[2], transition[3]
  next_state[from] = next_state[from] or {}
  next_state[from][event] = to
end

--- The state that `event` leads to; nil: it is none of that state's.
---@param from string
---@param event string
---@return string?
function states.next(from, event)
  return next_state[from] and next_state[from][event]
end

--- The diagram, in the language of https://mermaid.js.org (stateDiagram-v2).
---@return string
function states.diagram()
  local lines = { "stateDiagram-v2", "  [*] --> " .. states.first }
  for _, transition in ipairs(states.transitions) do
    lines[#lines + 1] = ("  %s --> %s: %s"):format(transition[1], transition[3], transition[2])
  end
  lines[#lines + 1] = "  closed --> [*]"
  return table.concat(lines, "\n") .. "\n"
end

--- The table for people, in Markdown.
---@return string
function states.table()
  local lines = { "| from | what happened | to | when |", "| --- | --- | --- | --- |" }
  for _, transition in ipairs(states.transitions) do
    lines[#lines + 1] = ("| %s | `%s` | %s | %s |"):format(transition[1], transition[2], transition[3], transition[4])
  end
  return table.concat(lines, "\n") .. "\n"
end

return states
