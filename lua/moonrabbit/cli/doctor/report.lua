--- What moonrabbit doctor finds: steps, written as they come, or all of them as one object.

local exit = require "moonrabbit.cli.exit"
local output = require "moonrabbit.cli.output"

---@class moonrabbit.cli.doctor.Report
local Report = {}
Report.__index = Report

local report = {}

--- A report without steps.
---@return moonrabbit.cli.doctor.Report
function report.new() return setmetatable({ steps = {}, code = exit.ok }, Report) end

-- Before the first line that is about a place.
local function write_heading(self)
  if self.heading then io.stdout:write("• endpoint    ", output.redact(self.heading), "\n") end
  self.heading = nil
end

local function add(self, step)
  step.endpoint = self.endpoint
  self.steps[#self.steps + 1] = step
  if output.is_json() then return end
  if step.ok and output.is_quiet() then return end
  write_heading(self)
  local text = output.redact(step.text)
  io.stdout:write(step.ok and "✓ " or "✗ ", ("%-12s"):format(step.step), text, "\n")
  if step.advice then io.stdout:write((" "):rep(14), "→ ", output.redact(step.advice), "\n") end
  io.stdout:flush()
end

--- What follows is about one endpoint of several; nil: about all again.
---@param name string?
---@param heading string? for people
function Report:about(name, heading) self.endpoint, self.heading = name, heading end

--- A step that is as it should be.
function Report:pass(name, text, data)
  add(self, { step = name, ok = true, text = text, data = data })
  return true
end

--- One that is not: with an exit code, and what to do. The first failure's code counts.
function Report:fail(name, code, text, advice, data)
  add(self, { step = name, ok = false, text = text, advice = advice, data = data })
  if self.code == exit.ok then self.code = code end
  return false
end

--- Writes what is not written yet; the exit code.
function Report:finish()
  if output.is_json() then
    local steps = {}
    for i, step in ipairs(self.steps) do
      steps[i] = {
        step = step.step, endpoint = step.endpoint, ok = step.ok, text = output.redact(step.text), data = step.data,
        advice = step.advice and output.redact(step.advice),
      }
    end
    output.result { ok = self.code == exit.ok, exit_code = self.code, steps = steps }
  end
  return self.code
end

--- A time for people.
---@param seconds number
---@return string
function report.ms(seconds)
  if seconds < 0.1 then return ("%.2f ms"):format(seconds * 1000) end
  return ("%.2f s"):format(seconds)
end

return report
