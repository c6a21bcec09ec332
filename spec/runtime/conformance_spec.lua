-- Every runtime does what spec/support/conformance.lua says, each in a process of its own.
local broker = require "support.broker"
local conformance = require "support.conformance"
local loops = require "support.loops"
local process = require "support.process"

local RUNTIMES = { "native", "cqueues", "copas", "luv" }

local function results_of(text)
  local results = {}
  for line in text:gmatch "[^\n]+" do
    local name, result = line:match "^(.-)\t(.*)$"
    if name then results[name] = result end
  end
  return results
end

describe("the contract of runtimes #smoke", function()
  local path, running, results = package.path, {}, {}

  setup(function()
    if broker.url then
      local parsed = broker.parsed()
      running.lines = process.start({ "spec/support/lines.lua", parsed.host, parsed.port })
      assert(running.lines:await "\n", running.lines:err())
    end
    local port = running.lines and running.lines:out():match "%d+"
    for _, runtime in ipairs(RUNTIMES) do
      if loops.has(runtime) then
        running[runtime] = process.start({ "spec/support/conform.lua", runtime, port }, { timeout = 180 })
      end
    end
  end)

  teardown(function()
    for _, one in pairs(running) do one:stop() end
    package.path = path
  end)

  for _, runtime in ipairs(RUNTIMES) do
    describe(runtime, function()
      if not loops.has(runtime) then
        pending(runtime .. " is not installed", function() end)
        return
      end

      it("ends by itself, with nothing on stderr", function()
        local one = running[runtime]
        assert.equal(0, one:wait(180), one:err() .. one:out())
        -- luv itself says so when a connection is reset.
        local text = one:err()
        if runtime == "luv" then text = text:gsub("EBADF: bad file descriptor\n", "") end
        assert.equal("", text)
        results[runtime] = results_of(one:out())
      end)

      for _, case in ipairs(conformance.cases) do
        it(case.name, function()
          local result = results[runtime] and results[runtime][case.name] or "it was not run"
          if result:find "^skipped" then pending(result) else assert.equal("ok", result) end
        end)
      end
    end)
  end
end)
