--- What of a broker's queues would disturb an app's retries: policies that match the ladder's queues, delivery limits that
-- are too low, steps that are stuck, orphans.
-- @module moonrabbit.life.warnings

local disposal = require "moonrabbit.app.disposal"

local warnings = {}

-- The ladders of an app by name, each with the queues that it brings messages home to.
local function ladders_of(app)
  local list, known = {}, {}
  for _, consumer in ipairs(app.plan.consumers) do
    local made = disposal.new { app = app.name, consumer = consumer, publisher = function() end }
    local name = made.ladder.name
    if made.threshold < math.huge then
      if not known[name] then
        known[name] = { ladder = made.ladder, consumed = {} }
        list[#list + 1] = known[name]
      end
      table.insert(known[name].consumed, consumer.queue)
    end
  end
  return list
end

-- What is there, and what the app will declare besides.
local function with_planned(app, there)
  local queues, known = {}, {}
  for _, queue in ipairs(there or {}) do
    queues[#queues + 1] = queue
    known[queue.name] = true
  end
  for name, queue in pairs(app.plan.queues) do
    if not known[name] then queues[#queues + 1] = { name = name, arguments = queue.arguments } end
  end
  return queues
end

--- What is wrong, as moonrabbit.app.ladder_check finds it, by the queue's name.
---@param app moonrabbit.App
---@param there table[]? the queues of the vhost, as Management:queues answers; nil: only what the script says is known
---@return moonrabbit.LadderProblem[]
function warnings.problems(app, there)
  local list, queues = {}, with_planned(app, there)
  for _, each in ipairs(ladders_of(app)) do
    for _, problem in ipairs(each.ladder:check(queues, each.consumed)) do list[#list + 1] = problem end
  end
  table.sort(list, function(a, b) return a.text < b.text end)
  return list
end

--- The same as lines for people.
---@param app moonrabbit.App
---@param there table[]?
---@return string[]
function warnings.of(app, there)
  local texts = {}
  for i, problem in ipairs(warnings.problems(app, there)) do texts[i] = problem.text end
  return texts
end

return warnings
