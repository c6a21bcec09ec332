--- What a cancelled task throws. It ends quietly unless it catches that.
return setmetatable({ kind = "cancelled", message = "the task was cancelled" }, {
  __tostring = function(self) return self.message end,
})
